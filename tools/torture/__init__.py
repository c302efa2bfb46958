"""A campaign against liborth: kills, failing disks, flipped bytes, hostile trees, damaged documents, planted secrets."""
