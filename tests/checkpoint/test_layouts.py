"""Ways in which the same weights may lie on the disk: all are read, and come back as they were."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny import files, pair, save, weights

from liborth_cli.checkpoint.reader import Checkpoint
from liborth_cli.errors import BadInput

INDEX = "model.safetensors.index.json"


def add_index(folder, name="model.safetensors"):
    """Lay an index beside a single file, as MLX does; give the file that name."""
    (folder / "model.safetensors").rename(folder / name)
    names = load_file(folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_single_file_with_its_index_comes_back_with_it(cli, tmp_path, name):
    base, finetuned = (add_index(folder, name) for folder in pair(tmp_path))
    before = files(finetuned)
    assert cli("split", base, finetuned, "--rank", 4, "-o", tmp_path / "general")[0] == 0
    assert {name, INDEX} <= {file.name for file in (tmp_path / "general").iterdir()}
    assert set(json.loads((tmp_path / "general" / INDEX).read_text())["weight_map"].values()) == {name}
    code, _, err = cli("excise", tmp_path / "general", "--beta", 1, "-o", tmp_path / "back")
    assert code == 0, err
    assert {file: (tmp_path / "back" / file).read_bytes() for file in (name, INDEX)} == {f: before[f] for f in (name, INDEX)}


def test_a_stale_index_is_said_to_name_other_files(tmp_path):
    save(tmp_path / "m", weights(), shards=2)
    save(tmp_path / "m", weights())
    with pytest.raises(BadInput, match=r"the index names model-00001-of-00002\.safetensors"):
        Checkpoint.open(tmp_path / "m")


def test_one_of_several_shards_is_not_a_checkpoint(tmp_path):
    save(tmp_path / "m", weights(), shards=2)
    with pytest.raises(BadInput, match="one of 2 files of a checkpoint; name the directory"):
        Checkpoint.open(tmp_path / "m" / "model-00001-of-00002.safetensors")


def test_names_that_no_file_can_have_are_refused(tmp_path):
    for name in ("x" * 300 + ".safetensors", "a\0b.safetensors", "a\x1bb.safetensors", "a\\b.safetensors"):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(BadInput, match="only plain") as refused:
            Checkpoint.open(tmp_path)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize("beside", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_full_weights_is_never_ignored(cli, tmp_path, beside):
    base, finetuned = pair(tmp_path)
    save_file({"a": weights()["embed.weight"]}, finetuned / beside)
    for words in (
        ("inspect", finetuned),
        ("inspect", finetuned / "model.safetensors"),
        ("split", base, finetuned, "--rank", 2),
    ):
        code, _, err = cli(*words)
        assert code == 3
        assert f"{beside} lies beside full weights" in err
