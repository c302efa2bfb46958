"""Tables of the surgery benchmark that come together from several runs."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.merge import merged, tables
from benchmarks.record import section_of
from benchmarks.surgery import goals
from benchmarks.surgery.measure import Found
from benchmarks.surgery.run import Line
from benchmarks.surgery.seeds import spread
from benchmarks.surgery.tofu.table import BEST, DOSES, HEAD, markdown

PAGE = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_a_section_merged_with_itself_or_nothing_is_the_same():
    section = section_of(PAGE, "surgery-small")
    assert section is not None
    whole = section[1].strip()
    assert merged(whole, whole) == merged("", whole) == merged(whole, "") == whole


def test_no_row_of_the_page_is_lost_where_a_run_has_only_one():
    """Rows of TOFU's tables are known by their edit, of which there are many doses."""
    section = section_of(PAGE, "tofu-small")
    assert section is not None
    old = tables(section[1])
    assert list(old) == [BEST, DOSES]
    tomorrow = ("an edit of tomorrow", *map(str, range(1, len(HEAD))))
    after = tables(merged(section[1], f"head\n\n{BEST}\n\n{markdown([list(tomorrow)])}", cells=False))
    kept = {tuple(row + [""] * (len(HEAD) - len(row))) for row in old[BEST][1:]}  # the page's row may lack the last column
    assert {tuple(row) for row in after[BEST]} == {HEAD, tomorrow} | kept
    assert sorted(after[DOSES]) == sorted(old[DOSES]) and len(after[DOSES]) > 20


def test_what_is_new_takes_the_place_of_the_old_and_all_else_stays():
    head = "At 99%:\n\n| kind | mine | theirs |\n|---|---|---|\n"
    of_a, of_b = "**A**, at 98%:\n\n| x |\n|---|\n| a |", "**B**, at 98%:\n\n| x | y |\n|---|---|\n| b | 0 |"
    old = f"machine one\n\n{head}| A | 1 | 2 |\n| C | 3 | 4 |\n\n{of_b}"
    new = f"machine two\n\n{head}| C | 5 |  |\n| B | 6 | 7 |\n\n{of_a}"
    assert merged(old, new) == f"machine two\n\n{head}| A | 1 | 2 |\n| B | 6 | 7 |\n| C | 5 | 4 |\n\n{of_a}\n\n{of_b}"


def test_another_set_of_columns_takes_no_row_of_the_old():
    old = "m\n\nAt 99%:\n\n| kind | mine |\n|---|---|\n| A | 1 |"
    new = "m\n\nAt 99%:\n\n| kind | theirs |\n|---|---|\n| B | 2 |"
    assert merged(old, new) == new


def test_a_table_that_gains_its_last_column_keeps_the_rows_that_lack_it():
    short, long = (
        "**A: codes**, at KL 0.01:\n\n| edit | AUC |" + more
        for more in ("\n|---|---|\n| svd | 1.00 |", " untold |\n|---|---|---|\n| half | 0.50 | 3 |")
    )
    whole = "**A: codes**, at KL 0.01:\n\n| edit | AUC | untold |\n|---|---|---|\n"
    assert merged(short, long) == f"{whole}| svd | 1.00 |  |\n| half | 0.50 | 3 |"
    assert merged(long, short) == f"{whole}| half | 0.50 | 3 |\n| svd | 1.00 |  |"


def test_seeds_are_means_with_half_the_range_and_one_seed_is_no_spread(tmp_path):
    def line(name, forget, skill, attacked, level=""):
        found = Found(skill, 5.0, 0.0, forget, None, 5.0, 0.0, 0.1, 0.5, None, None)
        return {"key": f"{name} at {level}" if level else name, **asdict(Line(name, "4", level, found, None, attacked))}

    for seed, (forget, attacked) in enumerate([(5.0, 3.0), (5.4, 3.2)]):
        lines = [
            line("base", 6.0, 6.0, 4.0),
            line("finetuned", 0.0, 2.0, None),
            line("never", 5.2, 2.0, 3.1),
            line("edit", forget, 2.0 + 0.08 * seed, attacked, "retention 98%"),
        ]
        for letter in "AB" if seed else "A":
            place = tmp_path / str(seed) / "results" / f"small-{letter}.jsonl"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("".join(json.dumps(one) + "\n" for one in lines))
    rows = spread([tmp_path / "0", tmp_path / "1"], "small", ["edit", "none had it"], "retention 98%").splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["edit", "retrained", "base"]
    assert rows[0].startswith("| A: codes in one pattern | 2 | edit | 99.0% ± 1.0 |")
    assert "5.20 ± 0.20 | 5.00 ± 0.00 | 0.20 ± 0.20 | 0.50 ± 0.00 | 3.10 ± 0.10 |" in rows[0]


def test_what_was_asked_stands_above_the_tables_as_they_are_now():
    section = section_of(PAGE, goals.SECTION)
    assert section is not None
    assert section[1].strip() == goals.told(PAGE), "python -m benchmarks.surgery.goals"


def test_what_recites_or_keeps_too_little_is_not_the_best_and_every_miss_is_told():
    head = ("edit", "skill kept", "recited", "AUC", "forget", "fresh", "general", "lowest attacked")
    table = {
        cells[0]: goals.Row(head, cells)
        for cells in (
            (goals.TUNED, "100.0%", "100%", "1.00", "0.0", "5.0", "4.000", ""),
            (goals.NEVER, "100.0%", "0%", "0.50", "5.0", "5.0", "4.000", "4.00"),
            ("recites", "99.9%", "4%", "0.50", "5.0", "5.0", "4.000", "4.00"),
            ("costs too much", "97.0%", "0%", "0.50", "5.0", "5.0", "4.000", "3.95"),
            ("not attacked", "99.9%", "0%", "0.50", "5.0", "5.0", "4.000", ""),
            ("weaker", "99.9%", "0%", "0.50", "5.0", "5.0", "4.000", "3.00"),
            ("best", "99.0%", "0%", "0.44", "5.0", "5.0", "4.080", "3.50"),
            ("best, half of them given", "99.0%", "0%", "0.50", "5.0", "5.0", "4.000", "3.90"),
        )
    }
    ends = table[goals.TUNED], table[goals.NEVER]
    best = goals.best(table, goals.CODES)
    assert best is table["best"]
    assert goals.best(table, goals.CODES, goals.FEWER[0]) is table["best, half of them given"], "a table of its own"
    assert goals.best(table, goals.CODES, goals.FEWER[1]) is None
    assert goals.missed(best, ends, goals.CODES) == ["the AUC, by 0.01", "the attack, by 0.40 nats"]
    assert goals.missed(best, ends, goals.PASSAGES) == ["general text, by 1.0%", "the attack, by 0.20 nats"]
    assert goals.missed(table["recites"], ends, goals.CODES) == []
    assert goals.best({name: row for name, row in table.items() if name.startswith(("*", "rec"))}, goals.CODES) is None
