"""Headers for hand-written results files: that of a golden file, with other values where a test says so."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "schema-2" / "golden" / "digits" / "margin" / "seed-0.jsonl"


def header(**changes):
    """Nested: ``header(config={"seed": 3})`` is another seed's, and all else of its configuration is the file's."""
    line = json.loads(GOLDEN.read_text().splitlines()[0])
    return merged({name: value for name, value in line.items() if name not in ("kind", "schema_version")}, changes)


def merged(old, new):
    nested = {name for name in old.keys() & new.keys() if isinstance(old[name], dict) and isinstance(new[name], dict)}
    return {**old, **new, **{name: merged(old[name], new[name]) for name in nested}}
