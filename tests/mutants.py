"""Seeded mistakes in the scientific core, and the tests that must catch them.

    python tests/mutants.py [name ...]

copies the project to a temporary folder, sees that the named tests pass there, then makes one mistake at a time and
runs its tests. Exit code 1 where a mistake survives. A mistake is a text that occurs once in the package, in whatever
file: the table outlives moves between modules. Torch is imported once, and each run is a fork: seconds for a mistake.
"""

import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dgal_bench"
# What takes seconds to import and is not ours; it must not start threads, for the forks' sake.
HEAVY = ("torch", "torchvision", "lightning", "torchmetrics.classification", "timm", "sklearn", "scipy.sparse.csgraph")
HEAVY += ("hypothesis", "omegaconf")
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Mutant:
    """``old``, once in the package, becomes ``new``; one of the ``tests`` (names of functions) must fail then."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


BIT_FOR_BIT = "test_any_sequence_of_memories_gives_the_bits_and_picks_of_the_whole_product"
SPECIFIED = "test_uncertainty_is_the_sort_of_its_formula"
SMALLEST_SCORES = "test_diffusion_takes_the_smallest_scores_ties_by_hash"
CONTINUED = "test_a_run_stopped_and_continued_is_the_same_bits"

# fmt: off
MUTANTS = (
    # diffusion
    Mutant("drop the clamp", "        values[labeled] = seeds\n", "        pass\n",
           ("test_one_propagation_gives_equation_8_and_appendix_c",)),
    Mutant("one diffusion step less", "for _ in range(steps):", "for _ in range(steps - 1):",
           ("test_one_step_touches_only_neighbours_of_labels",)),
    Mutant("chi with the wrong sign", "2 * heat_NC - mass(heat_NC)", "2 * heat_NC + mass(heat_NC)",
           ("test_scores_are_their_formulas",)),
    Mutant("negentropy upside down", "    return -entropy\n", "    return entropy\n",
           ("test_scores_are_their_formulas",)),
    Mutant("unreached points come last", "torch.full_like(scores, -1.0)", "torch.full_like(scores, 1.0)",
           ("test_scores_are_their_formulas",)),
    Mutant("one default step more", "log(max(2, self.graph_k)) - 1e-12)", "log(max(2, self.graph_k)) + 1)",
           ("test_default_steps_are_the_papers",)),
    # ties and the restriction
    Mutant("break ties by position", "level = _first_by_key(level, size - len(below), ids, ties)",
           "level = level[: size - len(below)]",
           ("test_ties_in_a_pool_stored_class_by_class_do_not_pick_one_class",)),
    Mutant("the setting of ties is ignored", '"position": lambda _: PositionOrder(),', '"position": lambda ties: ties,',
           ("test_diffusion_breaks_ties_by_position_where_told",)),
    Mutant("labeled points among the candidates", "    scores[labeled] = torch.inf\n", "    pass\n",
           ("test_labeled_points_are_no_candidates_where_all_scores_are_equal",)),
    Mutant("one candidate more than told", "size = min(self.restricted_size, pool.size",
           "size = min(self.restricted_size + 1, pool.size", (SMALLEST_SCORES,)),
    Mutant("a restriction that is not random", "rng.choice(len(points), min(size, len(points)), replace=False)",
           "np.arange(min(size, len(points)))", ("test_uniform_restriction_is_uniform",)),
    # incremental diffusion
    Mutant("labels of other rounds go on", "torch.equal(self.labels, labels[old])", "True", (BIT_FOR_BIT,)),
    Mutant("old labels are not clamped", "tensors[t][labeled] = seeds_mC",
           "tensors[t][new] = seeds_mC[len(labeled) - len(new) :]",
           ("test_rounds_of_a_run_on_any_number_of_threads",)),
    Mutant("labeled points get scores again", '        tensors["scores"][labeled] = torch.inf\n', "",
           (BIT_FOR_BIT,)),
    Mutant("a turn is not undone", "self._tensors[name].index_copy_(0, rows, old)", "pass",
           ("test_a_way_back_that_was_broken_off_is_gone_to_its_end",)),
    # neighbours and graph
    Mutant("a point is its own neighbour", "ids.masked_fill(ids == own[:, None], -1)\n    complete",
           "ids\n    complete", ("test_a_point_is_never_its_own_neighbour_among_duplicates",)),
    Mutant("distances of the wrong norm", ".square_().sum(-1).sqrt_()", ".abs_().sum(-1)",
           ("test_knn_is_brute_force_up_to_ties",)),
    Mutant("products without the factor 2", "queries * -2, queries.new_ones", "queries * -1, queries.new_ones",
           ("test_knn_is_brute_force_up_to_ties",)),
    Mutant("the kernel forgets the square", "_exp_minus(distances_nK.square() / scales_nK)",
           "_exp_minus(distances_nK / scales_nK)", ("test_affinity_is_the_formula",)),
    Mutant("not symmetrised", '"mean": lambda w, transposed: (w + transposed) / 2,', '"mean": lambda w, transposed: w,',
           ("test_blocks_of_rows_are_the_plain_expression", "test_affinity_is_the_formula")),
    Mutant("rows are not normalised", " = weights.data[block] / np.repeat(divisors[first:last], counts[first:last])",
           " = weights.data[block]", ("test_transition_is_stochastic_without_loops",)),
    Mutant("gradients are not conjugate", "_ratio(squared_C, before_C, open_C) * direction_NC", "0 * direction_NC",
           ("test_harmonic_is_the_dense_solution",)),
    # acquisitions
    Mutant("the largest margin", "scores = margins(query.predict(candidates).probs)",
           "scores = -margins(query.predict(candidates).probs)", (SPECIFIED,)),
    Mutant("the lowest entropy", "(outputs.probs * outputs.log_probs).sum(dim=1)",
           "-(outputs.probs * outputs.log_probs).sum(dim=1)", (SPECIFIED,)),
    Mutant("the highest confidence", "confidence = query.predict(candidates).probs.amax(dim=1)",
           "confidence = -query.predict(candidates).probs.amax(dim=1)", (SPECIFIED,)),
    Mutant("BADGE begins with the shortest gradient", "picks = [int(smallest(-norms, 1, ids, ties))]",
           "picks = [int(smallest(norms, 1, ids, ties))]",
           ("test_the_first_pick_has_the_longest_gradient_and_the_rest_follow_squared_distances",)),
    Mutant("BADGE draws by distance, not squared", "heap = weights.cumsum(0, dtype=torch.float64)",
           "heap = weights.sqrt().cumsum(0, dtype=torch.float64)",
           ("test_a_draw_is_in_proportion_to_weights_and_never_of_a_zero",)),
    Mutant("BADGE's squared distance wrong", "squared = torch.add(scale, product, alpha=-2, out=product)",
           "squared = torch.add(scale, product, alpha=-1, out=product)",
           ("test_it_equals_the_dense_one_on_many_points",)),
    Mutant("CoreSet forgets labeled centres", "features[: len(labeled)], features[len(labeled) :]",
           "features[:1], features[len(labeled) :]", ("test_it_starts_from_the_labeled_features",)),
    Mutant("CoreSet forgets its picks", "torch.minimum(nearest, squared, out=nearest)", "pass",
           ("test_it_equals_the_exhaustive_greedy",)),
    Mutant("skip a labeled point", 'query.memory.get("n_searched", 0)', 'query.memory.get("n_searched", 1)',
           ("test_the_graphs_neighbours_are_those_of_the_latents",)),
    # the network's answers
    Mutant("memoise the network across rounds", "features = self._module(images.to(self._device))",
           "features = type(self).__init__.__dict__.setdefault('first', self._module)(images.to(self._device))",
           ("test_every_network_answers_for_itself",)),
    Mutant("a point given twice is scored twice", "return ids[self._row[ids] == places]", "return ids",
           ("test_a_point_is_scored_once_however_often_it_is_asked_for",)),
    Mutant("nothing is memoised within the round", "missing = indices[self._row[indices] < 0]", "missing = indices",
           ("test_a_point_is_scored_once_however_often_it_is_asked_for",)),
    Mutant("points scored are not counted", "self.n_scored += len(ids)", "self.n_scored += 0",
           ("test_a_point_is_scored_once_however_often_it_is_asked_for",)),
    Mutant("train mode left on", "self._module = module.eval()", "self._module = module.train()",
           ("test_the_network_is_asked_in_eval_mode_without_gradients",)),
    # clock
    Mutant("an outer phase is charged for an inner one",
           "if self._stack:\n            self.seconds[self._stack[-1]] += now - self._mark",
           "for name in self._stack:\n            self.seconds[name] += now - self._mark",
           ("test_phases_are_exclusive_and_sum_to_the_total",)),
    Mutant("garbage is collected on the clock", "        gc.disable()\n", "",
           ("test_no_garbage_is_collected_on_the_clock",)),
    # seeds
    Mutant("the query's stream ignores the round", 'rng_for(seed, "query", round_)', 'rng_for(seed, "query")',
           ("test_seed_and_round_matter",)),
    Mutant("ties ignore the round", 'seed_for(seed, "ties", round_)', 'seed_for(seed, "ties")',
           ("test_the_streams_of_a_round_belong_to_seed_and_round_alone",)),
    Mutant("weights depend on the strategy", '(self.config.seed, "weights", round_)',
           '(self.config.seed, "weights", round_, self.config.strategy.name)',
           ("test_initial_weights_differ_by_seed_and_round_only",)),
    Mutant("first labels from the global generator", 'rng_for(seed, "initial").permutation(n_points)',
           "__import__('numpy').random.permutation(n_points)",
           ("test_initial_set_depends_on_the_seed_alone",)),
    Mutant("a seed forgets its role", "json.dumps([seed, *role])", "json.dumps([seed, *role[1:]])",
           ("test_streams_differ_by_seed_and_by_each_word",)),
    # pool, rows, resume
    Mutant("labeled points pass the check", "if labeled := int(mask[self.labeled].sum()):", "if labeled := 0:",
           ("test_check_distrusts_a_batch",)),
    Mutant("new labels come first", "torch.cat([self.labeled, batch])", "torch.cat([batch, self.labeled])",
           ("test_annotate_moves_points_and_keeps_the_partition",)),
    Mutant("resume ignores the picks", 'rows.header["initial"] + picks(rows.records)', 'rows.header["initial"]',
           (CONTINUED,)),
    Mutant("resume skips a round", "data.labels[labeled]), len(rows.records)",
           "data.labels[labeled]), len(rows.records) + 1", (CONTINUED,)),
    Mutant("a query remembers nothing", "memory = result.query.remembered", "memory = {}",
           ("test_what_a_query_remembers_is_the_next_ones_memory_and_no_others",)),
    Mutant("a torn last line is read", 'whole = raw[: raw.rfind(b"\\n") + 1]', "whole = raw",
           ("test_a_torn_last_line_is_cut_and_the_run_goes_on",)),
    Mutant("a row twice is accepted", "if [r.round for r in records] != list(range(len(records))):", "if False:",
           ("test_rows_out_of_order_are_refused",)),
    Mutant("neighbours of another class are not counted", "float((near != labels[point]).float().mean())",
           "float((near == labels[point]).float().mean())", ("test_boundary_share_by_hand",)),
    # training
    Mutant("KL with the wrong sign", "recon_weight * error + kl\n", "recon_weight * error - kl\n",
           ("test_a_collapsed_latent_is_an_error_that_says_so",)),
    Mutant("KL averaged over latents", "log_variance.exp() - 1 - log_variance).sum(1)",
           "log_variance.exp() - 1 - log_variance).mean(1)", ("test_the_loss_sums_over_pixels_and_over_latents",)),
    Mutant("accuracy on the wrong split", "self.data.test_images, self.data.test_labels, everything, self",
           "self.data.images, self.data.labels, everything, self", ("test_accuracy_is_the_share_of_right_answers",)),
    Mutant("patience one epoch too long", "armed and self.stale >=", "armed and self.stale >",
           ("test_training_stops_after_patience_epochs_without_min_delta",)),
)
# fmt: on


def files_with(text: str, package: Path) -> list[Path]:
    """Files of a package that hold a text, each as often as it does."""
    return [path for path in sorted(package.rglob("*.py")) for _ in range(path.read_text().count(text))]


def place(test: str) -> list[str]:
    """Where a test function stands, as pytest wants it."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{p.name}::{test}" for p in paths if re.search(rf"^def {test}\(", p.read_text(), re.MULTILINE)]


def run(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """The tests of the copy in a forked process: pytest's exit code (negative: a signal) and its output."""
    places = [one for test in dict.fromkeys(tests) for one in place(test)]
    words = [*places, "-x", "-q", "-p", "no:cacheprovider", "-m", "", "--hypothesis-seed=0"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that are imported already
    log = copy / "output.txt"
    child = os.fork()
    if child == 0:
        code = 70  # of what pytest did not survive; the fork must never return from here
        try:
            signal.alarm(LIMIT_SECONDS)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(copy)
            sys.path.insert(0, str(copy))
            code = int(importlib.import_module("pytest").main(words))
        except BaseException:  # noqa: BLE001 - to the log; nobody above is to have it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text(errors="replace")


def outcome(mutant: Mutant, copy: Path) -> tuple[bool, str]:
    """Whether its tests catch it, and the first that does."""
    (path,) = files_with(mutant.old, copy / PACKAGE.name)
    sound = path.read_text()
    path.write_text(sound.replace(mutant.old, mutant.new))
    try:
        code, output = run(copy, mutant.tests)
    finally:
        path.write_text(sound)
    failed = re.search(r"^FAILED \S+?::(\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return True, failed[1]
    return False, "SURVIVED" if code == 0 else f"no test failed, but pytest ended with {code}:\n{output[-2000:]}"


def main(names: Sequence[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    if len(chosen) < len(names):
        raise SystemExit(f"known: {', '.join(mutant.name for mutant in MUTANTS)}")
    sys.dont_write_bytecode = True  # two mistakes of a second and of one length would share it
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        unwanted = shutil.ignore_patterns("__pycache__", ".*", "build")
        for name in (PACKAGE.name, "tests", "conf"):
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
        shutil.copy(ROOT / "pyproject.toml", copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        for name in HEAVY:
            importlib.import_module(name)
        hypothesis = importlib.import_module("hypothesis")
        found = (hypothesis.Phase.explicit, hypothesis.Phase.generate)  # to shrink an example takes ten seconds
        hypothesis.settings.register_profile("unshrunk", phases=found, database=None)
        hypothesis.settings.load_profile("unshrunk")
        code, output = run(copy, [test for mutant in chosen for test in mutant.tests])
        if code:
            sys.stdout.write(f"without a mistake the tests do not pass:\n{output[-3000:]}\n")
            return 1
        survivors = 0
        for mutant in chosen:
            began = time.perf_counter()
            caught, told = outcome(mutant, copy)
            survivors += not caught
            sys.stdout.write(f"{mutant.name:45} {time.perf_counter() - began:4.0f} s  {told}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - survivors} of {len(chosen)} caught\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
