"""What a line of a results file must be: one schema for readers and ``dgal-bench validate``, and for older files.

A reader passes over fields that it does not know, which a later version may have added; validate names them.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from dgal_bench.config.schema import RunConfig, config_hash
from dgal_bench.core.errors import ResultsError
from dgal_bench.results.rows import STRICT, RoundRecord, Timing

SCHEMA_VERSION = 2
"""Raised when older lines would change their meaning, or could no longer be read.

1: ``jobs`` counts the runs of one command; the oldest headers lack weights, files and facts of the data. Every run has
   begun: its header names the initial set.
2: ``jobs`` counts all runs on the machine, ``busy_elsewhere`` is the cores that other processes kept busy; a header
   without an initial set is of a run that failed or was skipped before it began; lines of kind ``skipped``.
"""

TIMINGS_VERSION = 1
"""Of timings files alone. Files of other versions are refused: a replay makes them again."""

RESTORE = "restore the line, or remove the file to start over"

Line = Mapping[str, Any]


class _Closed(BaseModel):
    model_config = STRICT


class _Open(BaseModel):
    """May hold other facts beside those that readers need."""

    model_config = STRICT | ConfigDict(extra="allow")


class Git(_Closed):
    revision: str | None
    dirty: bool | None


class Machine(_Open):
    cpu: str
    cores: int


class Provenance(_Open):
    git: Git
    versions: dict[str, str]
    machine: Machine


class OutlineFingerprint(_Closed):
    algorithm_version: int
    config: str


class Fingerprint(OutlineFingerprint):
    data: str
    latents: str
    graph: str
    weights: str | None
    files: str | None
    git: str | None
    torch: str
    cpu: str
    vectors: str = ""
    device: str
    threads: int


class HeaderOutline(_Closed):
    """The header of a run that failed or was skipped before it began."""

    kind: Literal["header"]
    schema_version: int
    cell: str
    profile: str
    config: RunConfig
    fingerprint: OutlineFingerprint
    provenance: Provenance
    command: list[str] = []  # words of ``dgal-bench run`` that make the run again; none in older files


class DataFacts(_Open):
    """None: not in older files."""

    pool: int | None = None
    test: int | None = None
    shape: list[int] | None = None
    n_classes: int | None = None


class RepresentationFacts(_Open):
    seconds: float
    label_share: dict[str, float]


class GraphFacts(_Open):
    seconds: float
    components: int
    exact: bool
    recall: float


class Setup(_Open):
    """Both are missing in the header of full supervision, which has no graph."""

    representation: RepresentationFacts | None = None
    graph: GraphFacts | None = None


class Header(HeaderOutline):
    fingerprint: Fingerprint
    data: DataFacts
    network: dict[str, Any]
    setup: Setup
    initial: list[int]
    initial_classes: list[int] = []  # none in older files

    @model_validator(mode="after")
    def _check_setup(self) -> "Header":
        missing = [name for name in ("representation", "graph") if getattr(self.setup, name) is None]
        if missing and not self.config.full_supervision:
            raise ValueError(f"setup.{missing[0]} is missing")
        return self


class Failure(_Closed):
    kind: Literal["failure"]
    error: str
    traceback: str


class Skipped(_Closed):
    kind: Literal["skipped"]
    why: str


class Continuation(_Closed):
    kind: Literal["continuation"]
    changed: list[str]
    provenance: Provenance | None = None


class TimingsHeader(_Closed):
    kind: Literal["timings"]
    schema_version: int
    cell: str
    common: str | None
    picks: str
    rounds: list[int]
    repeats: int
    when: str
    changed: list[str]
    fingerprint: Fingerprint
    provenance: Provenance


Schema = TypeAdapter[Any]

HEADER: Schema = TypeAdapter(Header)
OUTLINE: Schema = TypeAdapter(HeaderOutline)
ROUND: Schema = TypeAdapter(RoundRecord)
TIMINGS_HEADER: Schema = TypeAdapter(TimingsHeader)
TIMING: Schema = TypeAdapter(Timing)
SCHEMAS: Mapping[str, Schema] = {
    "round": ROUND, "failure": TypeAdapter(Failure), "skipped": TypeAdapter(Skipped),
    "continuation": TypeAdapter(Continuation),
}  # fmt: skip
"""The kinds of line that may follow a header."""

NEW_IN_2 = {"kinds": {"skipped"}, "fields": {"busy_elsewhere"}}
"""What a file of schema 1 cannot hold."""


def parse_line(schema: Schema, line: Line, where: str) -> Any:
    """The line as its schema's type; fields that the schema does not have are left out.

    Raises:
        ResultsError: a field is missing or of another type; ``where`` names file and line.
    """
    try:
        return schema.validate_json(json.dumps(_fields(line, schema)), extra="ignore")
    except ValidationError as error:
        raise ResultsError(f"{where}: {_misfits(error)[0]}: {RESTORE}") from None


def find_misfits(schema: Schema, line: Line) -> list[str]:
    """Everything in which a line is not of its schema: a text for each field."""
    try:
        schema.validate_json(json.dumps(_fields(line, schema)))
    except ValidationError as error:
        return _misfits(error)
    return []


def _fields(line: Line, schema: Schema) -> Line:
    """Rows and timings are types of the program, which know nothing of kinds of lines."""
    return {name: value for name, value in line.items() if name != "kind"} if schema in (ROUND, TIMING) else line


_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "string_type": "a text", "bool_type": "true or false", "list_type": "a list",
    "dict_type": "an object", "dataclass_type": "an object", "model_type": "an object", "literal_error": "another text",
}  # fmt: skip


def _misfits(error: ValidationError) -> list[str]:
    """``epochs is missing``, ``jobs is 1.5, where a whole number should be``: the first error of each field."""
    texts: dict[str, str] = {}
    for one in error.errors(include_url=False):
        # of a union, pydantic names the type that it tried as well
        path = [part for part in one["loc"] if part not in ("int", "str", "float", "bool")]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        value = json.dumps(one["input"])
        if one["type"] == "missing":
            text = f"{name} is missing"
        elif one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            text = f"{name} is no field of this kind of line"
        elif one["type"] == "value_error":
            text = str(one["ctx"]["error"])
        else:
            short = value if len(value) <= 40 else f"{value[:37]}..."
            text = f"{name} is {short}, where {_EXPECTED.get(one['type'], one['msg'])} should be"
        texts.setdefault(name, text)
    return list(texts.values())


# Older files.

OLDER_DEFAULTS: Line = {
    "fingerprint": {"vectors": ""},
    "config": {
        "propagation": "none",
        "dataset": {"path": None, "image_size": None, "test_share": 0.2},
        "net": {
            "hidden": [], "pretrained": False, "checkpoint_path": None, "input_size": None, "stem": "auto",
            "channels_last": True, "amp": False,
        },
        "representation": {
            "encoder": "cnn", "amp": False, "path": None, "test_path": None, "model": None, "pretrained": False,
            "checkpoint_path": None, "input_size": None,
        },
        "trainer": {"devices": 1},
        "graph": {"recall_target": 0.99},
    },
}  # fmt: skip
"""What an older header lacks, with the value that behaves as the code of its time did."""

SCHEMA_1_DEFAULTS: Line = {"data": {}, "fingerprint": {"weights": None, "files": None}}


def read_header(line: Line, where: str) -> dict[str, Any]:
    """A header as this version would have written it.

    A configuration with settings of OLDER_DEFAULTS gets the hash of the whole, so that the run can be continued.

    Raises:
        ResultsError: line 1 is no header, a newer version's, or a field is missing or of another type.
    """
    check_version(line, where)
    header = complete_header(line)
    parse_line(header_schema(line), header, f"{where}, line 1")
    if header["config"] != line["config"] and line["fingerprint"]["config"] in config_hashes(line):
        header["fingerprint"] = header["fingerprint"] | {"config": config_hash(header["config"])}
    return header


def check_version(header: Line, where: str) -> None:
    """Raises ResultsError where a line is no header, or of a version that this one does not read."""
    version = header.get("schema_version")
    if header.get("kind") != "header" or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ResultsError(
            f"{where}, line 1: schema {version if version is not None else 'no schema_version'}, where this version "
            f"reads 1 to {SCHEMA_VERSION}: use another results=DIR"
        )
    if version > SCHEMA_VERSION:
        raise ResultsError(
            f"{where}, line 1: schema {version}, where this version reads 1 to {SCHEMA_VERSION}: update dgal-bench, "
            "or use another results=DIR"
        )


def complete_header(line: Line) -> dict[str, Any]:
    """With the values of OLDER_DEFAULTS for what it lacks, in this version's schema; types are not checked."""
    header = _complete(line, SCHEMA_1_DEFAULTS) if line["schema_version"] == 1 else line
    header = _complete(
        header, OLDER_DEFAULTS if header_schema(line) is HEADER else {"config": OLDER_DEFAULTS["config"]}
    )
    with suppress(KeyError, TypeError, AttributeError):  # of another type, which is found later
        header["config"]["dataset"].setdefault("kind", header["config"]["dataset"]["name"])
    return {**header, "schema_version": SCHEMA_VERSION}


def header_schema(line: Line) -> Schema:
    """HEADER, or OUTLINE for a run that never began."""
    return HEADER if "initial" in line or line["schema_version"] == 1 else OUTLINE


def _complete(given: Line, absent: Line) -> dict[str, Any]:
    both = {name for name in given.keys() & absent.keys() if isinstance(given[name], dict)}
    return {**absent, **given, **{name: _complete(given[name], absent[name]) for name in both if absent[name]}}


def config_hashes(header: Line) -> set[str]:
    """Valid hashes of a header's configuration as it stands; in schema 1 also an older one, which covers paths too."""
    config = header["config"]
    with_paths = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {config_hash(config)} | ({with_paths} if header["schema_version"] == 1 else set())
