"""What a command asks for: where and how to run, and the grid of cells, every word of it checked."""

from dgal_bench.request.mirror import project_of, tracking_of, wandb_of
from dgal_bench.request.places import cache_root, check_writable, data_root, offline, results_root
from dgal_bench.request.replays import replay_of
from dgal_bench.request.sweeps import PLACES, axes_of, settings_of, wants_report
from dgal_bench.request.words import only_flags, only_places, only_settings

__all__ = [
    "PLACES", "axes_of", "cache_root", "check_writable", "data_root", "offline", "only_flags", "only_places",
    "only_settings", "project_of", "replay_of", "results_root", "settings_of", "tracking_of", "wandb_of",
    "wants_report",
]  # fmt: skip
