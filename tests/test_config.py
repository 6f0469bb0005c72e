"""Composition: groups, overrides, profiles; and mistakes that name the nearest right spelling."""

import json
from itertools import product

import pytest
from omegaconf import OmegaConf

from dgal_bench.config.compose import GROUPS, compose, group_names, read_group
from dgal_bench.config.schema import (
    KINDS,
    OWN_KINDS,
    NetConfig,
    RepresentationConfig,
    StrategyConfig,
    check_budget,
    dataset_config,
    differences,
    flatten,
    from_dict,
    from_trusted_dict,
    needs_no_conversion,
    to_dict,
)
from dgal_bench.conformance import example_config
from dgal_bench.core.errors import ConfigError, ResultsError
from dgal_bench.results.resume import check_resumable
from dgal_bench.results.rows import RunLog
from dgal_bench.strategies import resolve_parts


def config(*overrides, **choices):
    defaults = {"dataset": "digits", "representation": "vae", "profile": "cpu", "strategy": "dgmg"}
    return compose({**defaults, **choices}, overrides)


def combinations():
    """Of data sets, profiles and strategies: digits' cpu and dgmg with all, every strategy with every profile.

    Not the whole product: a strategy's file speaks of the strategy alone (below), so the others meet it in any company.
    """
    datasets, profiles, strategies = map(group_names, ("dataset", "profile", "strategy"))
    pairs = list(product(strategies, profiles))  # dealt to the data sets in turn: each gets every profile
    dealt = {(datasets[n % len(datasets)], profile, strategy) for n, (strategy, profile) in enumerate(pairs)}
    for dataset, profile, strategy in product(datasets, profiles, strategies):
        fast = strategy == "dgmg" or (dataset, profile) == ("digits", "cpu")
        if fast or (dataset, profile, strategy) in dealt:
            yield pytest.param(dataset, profile, strategy, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("dataset", "profile", "strategy"), combinations())
def test_every_combination_composes_and_survives_json(dataset, profile, strategy):
    made = config(dataset=dataset, profile=profile, strategy=strategy)
    resolve_parts(made.strategy)
    again = from_dict(to_dict(made))
    assert again == made
    assert again.hash == made.hash
    assert (made.profile, made.dataset.name, made.strategy.name) == (profile, dataset, strategy)


@pytest.mark.parametrize("part", [NetConfig, RepresentationConfig, StrategyConfig])
def test_what_is_taken_as_it_stands_is_what_omegaconf_makes_of_it(part):
    """Also nothing that it would convert, refuse or resolve is taken so."""
    odd = (
        True, 1, 0.5, "a", "1", "${seed}", "???", None, [], [1], [True], ["${seed}"], {}, {"a": [1, {"b": None}]},
        {"a": "???"}, {1: 1}, (1,), b"a",
    )  # fmt: skip
    made = {NetConfig: config().net, RepresentationConfig: config().representation, StrategyConfig: config().strategy}
    values = to_dict(made[part])
    schema = OmegaConf.structured(part)
    n_taken = 0
    for name, value in [(name, value) for name in values for value in odd]:
        changed = {**values, name: value}
        if needs_no_conversion(changed, part):
            n_taken += 1
            assert repr(OmegaConf.to_object(OmegaConf.merge(schema, changed))) == repr(part(**changed))
    assert n_taken >= len(values)
    assert not needs_no_conversion({**values, "other": 1}, part)
    assert not needs_no_conversion({name: values[name] for name in list(values)[1:]}, part)


@pytest.mark.parametrize("strategy", group_names("strategy"))
def test_a_strategys_file_speaks_of_the_strategy_alone(strategy):
    assert set(read_group("strategy", strategy)) == {"strategy"}


def test_numbers_of_the_paper():
    """Table 1 and App. A, where the profile is the paper's."""
    mnist = config(dataset="mnist", profile="paper")
    assert (mnist.initial_size, mnist.restricted_size, mnist.batch_size, mnist.rounds) == (10, 100, 10, 30)
    assert mnist.representation.latent_dim == 50
    assert (mnist.representation.lr, mnist.representation.max_epochs, mnist.representation.patience) == (5e-4, 300, 20)
    training = mnist.training
    assert (training.optimizer, training.lr, training.momentum, training.weight_decay) == ("sgd", 1e-3, 0.9, 5e-4)
    assert (training.patience, training.min_delta, training.min_epochs, training.max_epochs) == (10, 0.01, 20, 1000)
    digits = config(profile="paper")
    assert (digits.initial_size, digits.restricted_size, digits.batch_size, digits.rounds) == (10, 50, 10, 15)
    assert (digits.representation.latent_dim, digits.representation.recon_weight) == (16, 784 / 64)
    assert (digits.training.optimizer, digits.training.lr, digits.training.max_epochs) == ("adam", 1e-3, 60)


@pytest.mark.slow
def test_a_profiles_file_lists_every_difference_from_paper():
    """What a profile changes is what its file says, key by key."""
    from omegaconf import OmegaConf

    papers = {dataset: to_dict(config(dataset=dataset, profile="paper")) for dataset in group_names("dataset")}
    for profile in group_names("profile"):
        for dataset in papers:
            listed = set()
            for section in ("all", dataset):
                listed |= flatten(OmegaConf.to_container(read_group("profile", profile)).get(section) or {}).keys()
            changed = differences(papers[dataset], to_dict(config(dataset=dataset, profile=profile)))
            names = {line.partition(":")[0] for line in changed}
            # restricted_size reaches the strategy's part by interpolation, the optimiser follows the network
            follows = {f"training.{name}" for name in ("optimizer", "momentum", "weight_decay")}
            assert names - listed <= {"profile", "strategy.restrict.restricted_size", *follows}


@pytest.mark.parametrize(
    ("dataset", "initial", "latent_dim", "sizes", "net", "pretrained", "encoder"),
    [
        ("mnist", 10, 50, (100, 10, 30), "cnn", False, "cnn"),
        ("emnist", 20, 256, (200, 20, 50), "resnet18", True, "cnn"),
        ("svhn", 100, 100, (500, 50, 50), "resnet50", False, "cnn"),
        ("cifar10", 100, 100, (5000, 200, 20), "resnet50", True, "cnn"),
        ("cifar100", 100, 100, (5000, 200, 20), "vit_small", True, "resnet18"),
        ("mini_imagenet", 100, 100, (5000, 200, 20), "vit_small", True, "resnet18"),
    ],
)
def test_table_1(dataset, initial, latent_dim, sizes, net, pretrained, encoder):
    """Initial labels, DimVAE, Pre_n/Budget/Round, architecture, pre-trained; the encoder is App. A's."""
    for profile in ("paper", "cpu"):
        made = config(dataset=dataset, profile=profile, representation="default")
        assert (made.initial_size, made.representation.latent_dim) == (initial, latent_dim)
        assert (made.restricted_size, made.batch_size, made.rounds) == sizes
        assert (made.net.kind, made.net.pretrained, made.representation.encoder) == (net, pretrained, encoder)
        optimizer = ("adam", 0.0, 0.0) if pretrained else ("sgd", 0.9, 5e-4)
        assert (made.training.optimizer, made.training.momentum, made.training.weight_decay) == optimizer
        assert made.training.lr == 1e-3


def test_where_ones_own_files_lie_is_in_no_hash_but_that_they_are_used_is():
    def hashed(*overrides, dataset="folder"):
        return config(*overrides, dataset=dataset).hash

    assert hashed("dataset.path=a") == hashed("dataset.path=b") != hashed()
    weights = [hashed("net.kind=resnet18", f"net.checkpoint_path={path}") for path in ("a.pth", "b.pth", "null")]
    assert weights[0] == weights[1] != weights[2]
    assert config("dataset.path=a", "net.checkpoint_path=b", dataset="folder").own_files == ["a", "b"]
    # a plugin's setting of that name is not ours to know
    parts = [hashed(f"strategy.acquire.path={path}", dataset="digits") for path in ("a", "b")]
    assert parts[0] != parts[1]


def test_only_the_diffusions_own_memory_limit_is_in_no_hash():
    def hashed(limit, kind):
        return config(f"strategy.restrict={{kind: {kind}, restricted_size: 20, memory_limit: {limit}}}").hash

    assert hashed(0, "diffusion") == hashed(1, "diffusion")
    # a plugin's setting of that name may change what it picks
    assert hashed(0, "plugins_own") != hashed(1, "plugins_own")


def test_a_refusal_tells_what_differs_and_no_allowance(tmp_path):
    then, now = (config(f"strategy.restrict.memory_limit={limit}", f"rounds={limit}") for limit in (1, 2))
    header = {"config": to_dict(then), "fingerprint": {"config": then.hash}}
    log = RunLog(tmp_path / "seed-0.jsonl", header, (), None, None, (), (), 0)
    with pytest.raises(ResultsError, match=r"another configuration \(rounds: 1 -> 2\)"):
        check_resumable(log, {"config": to_dict(now), "fingerprint": {"config": now.hash}}, anyway=True)


@pytest.mark.parametrize("dataset", ["folder", "npz", "embeddings"])
def test_ones_own_data_may_have_a_name_of_their_own(dataset):
    made = config("dataset.name=birds", dataset=dataset, representation="default")
    assert (made.dataset.name, made.dataset.kind) == ("birds", "folder" if dataset == "folder" else "npz")


def test_overrides_win_and_reach_the_parts():
    made = config(
        "graph.graph_k=7",
        "restricted_size=33",
        "training.lr=1e-2",
        "net.channels=[4,8]",
        "strategy.restrict.score=margin",
    )
    assert made.graph.graph_k == 7
    assert made.training.lr == 0.01
    assert made.net.channels == [4, 8]
    assert made.strategy.restrict == {"kind": "diffusion", "restricted_size": 33, "score": "margin"}


def test_the_hash_is_of_the_values():
    assert config("rounds=3").hash == config("rounds=3").hash
    assert len({config(*o).hash for o in ([], ["rounds=3"], ["seed=1"], ["training.lr=0.002"])}) == 4
    assert config(profile="cpu").hash != config(profile="paper").hash


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rouns=3", "unknown key 'rouns'; did you mean 'rounds'?"),
        ("graph_k=3", "unknown key 'graph_k'; did you mean 'graph.graph_k'?"),
        ("graph.kernle=uniform", "unknown key 'graph.kernle'; did you mean 'graph.kernel'?"),
        ("rounds=many", "rounds: Value 'many' of type 'str' could not be converted to Integer"),
        ("deterministic=perhaps", "deterministic: Value 'perhaps' is not a valid bool"),
        ("rounds=0", "rounds=0 is too small: use 1 or more"),
        ("graph.graph_k=0", "graph.graph_k=0 is too small"),
        ("restricted_size=5", "restricted_size=5 is below batch_size=10"),
        ("training.train_batch_size=1", "training.train_batch_size=1 is too small: use 2 or more"),
        *(
            (
                f"{section}={value}",
                f"{section}={value}: {section} is a section of settings: give one of them, {section}.",
            )
            for section in ("training", "net", "strategy.acquire")
            for value in ("3", "null", "[1]")
        ),
        ("device=gpu", "unknown device 'gpu'"),
        ("training.optimizer=sdg", "unknown training.optimizer 'sdg'; did you mean 'sgd'?"),
        ("graph.kernel=uniformly", "unknown graph.kernel 'uniformly'; did you mean 'uniform'?"),
        ("net.kind=cnm", "unknown net.kind 'cnm'; did you mean 'cnn' or"),
        ("graph.backend=fais", "unknown graph.backend 'fais'; did you mean 'faiss'?"),
        ("net.channels=[1,2", "net.channels=[1,2: the value is not valid YAML"),
        ("training.lr=nan", "training.lr=nan: use a number of 0 or more"),
        ("training.momentum=0.9", "training.momentum=0.9 is sgd's: set training.momentum=0 with adam"),
        ("representation.holdout=1.5", "representation.holdout=1.5: use a share above 0 and up to 0.5"),
        ("representation.threads=0", "representation.threads=0 is too small"),
        ("net.kernels=[0,3]", "net.kernels=0 is too small"),
        ("representation.seed=mine", "representation.seed=mine: use a number, or 'cell'"),
        ("net.channels=[3]", "net.channels, net.kernels and net.pools must have the same length"),
    ],
)
def test_a_mistake_is_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        config(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_name_lists_the_choices(group):
    with pytest.raises(ConfigError, match=f"unknown {group} 'nothing-like-it'.*{group_names(group)[0]}"):
        config(**{group: "nothing-like-it"})


def test_one_representation_per_seed_on_request():
    assert config("seed=4").representation_seed == 0
    assert config("seed=4", "representation.seed=cell").representation_seed == 4


def test_a_run_must_fit_its_pool():
    check_budget(config("rounds=142"), 1437)  # 10 + 142 x 10 = 1,430
    with pytest.raises(ConfigError, match="= 1440 labels, but the pool has 1437 points"):
        check_budget(config("rounds=143"), 1437)
    with pytest.raises(ConfigError, match=r"graph.graph_k=20, but a point of 20 has only 19 neighbours"):
        check_budget(config("rounds=1", "batch_size=1"), 20)


def test_differences_name_the_leaf():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> None", "e: None -> 5"]


def test_the_kinds_known_beforehand_are_those_of_the_registries():
    from dgal_bench.graph.affinity import KERNELS, SYMMETRIZERS
    from dgal_bench.graph.knn import BACKENDS
    from dgal_bench.models.nets import OWN_NETS
    from dgal_bench.representation import REPRESENTATIONS

    assert set(OWN_NETS) == set(OWN_KINDS)
    registries = {
        "representation.kind": REPRESENTATIONS, "graph.kernel": KERNELS,
        "graph.symmetrize": SYMMETRIZERS, "graph.backend": {"auto", *BACKENDS},
    }  # fmt: skip
    assert {key: set(KINDS[key]) for key in registries} == {key: set(registry) for key, registry in registries.items()}


def test_a_setting_of_parts_is_in_the_configuration_of_those_that_use_it_only():
    """A finished run of random is none the less finished after another seals_k."""
    for setting, users in (("seals_k=3", {"seals", "vae_seals_matched"}), ("adversary_steps=7", {"ganvae"})):
        for strategy in ("random", "dgmg", "seals", "vae_seals_matched", "ganvae"):
            assert (example_config(strategy, setting).hash != example_config(strategy).hash) == (strategy in users)


@pytest.mark.parametrize("strategy", group_names("strategy"))
def test_a_configuration_sent_to_a_worker_comes_back_the_same(strategy):
    config = example_config(strategy)
    again = from_trusted_dict(json.loads(json.dumps(to_dict(config))))
    assert (again, again.hash) == (config, config.hash)


def test_the_data_set_of_an_older_configuration_is_read_alone():
    made = config()
    values = to_dict(made)
    del values["graph"]["recall_target"]
    assert dataset_config(values) == made.dataset
    del values["dataset"]["test_share"]
    with pytest.raises(ResultsError, match="as by another version"):
        dataset_config(values)
