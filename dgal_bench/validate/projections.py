"""Projection files, which only figures read: whether they can be read, and are of what lies beside them."""

from collections.abc import Sequence
from pathlib import Path

from dgal_bench.errors import ResultsError
from dgal_bench.projection import file_name
from dgal_bench.report.projections import read_file
from dgal_bench.validate.cells import Report


def examine_projection(path: Path, cells: Sequence[Report]) -> Report:
    """Every problem of a projection beside ``cells`` and others; raises nothing."""
    report = Report(path)
    try:
        found = read_file(path)
    except ResultsError as error:
        report.problems.append((0, str(error).removeprefix(f"{path} ")))
        return report
    if found is None:
        return report  # gone meanwhile
    if path.name != file_name(found.latents_sha256):
        report.problems.append((0, f"of latents {found.latents_sha256[:8]}, which its name does not say"))
    beside = [cell for cell in cells if path.parent in cell.path.parents and cell.begun]
    if not any((cell.header or {})["fingerprint"]["latents"] == found.latents_sha256 for cell in beside):
        report.notes.append((0, "of latents that no cell here rests on yet, or any more"))
    return report
