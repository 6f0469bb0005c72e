"""Several processes train the VAE that one trains; what ends one of them ends all, with one line."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from dgal_bench.core.errors import ConfigError, UserError
from dgal_bench.core.seeding import isolated
from dgal_bench.models.vae import Batches, Share, VaeModule, train_vae
from dgal_bench.models.vae_nets import build_vae
from tests.sweeping import is_alive
from tests.test_vae import CPU, blobs, config

in_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
FOR_EVER = {"max_epochs": 100_000, "patience": 100_000}


def silent(what, done, of):
    pass


def train(data, devices, progress=silent, **settings):
    with isolated(0, "test"):
        return train_vae(data, config(**settings), 0, CPU, progress, devices)


def difference(one, other):
    """The largest of any parameter's."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_rows_of_a_batch_and_the_mean_of_their_gradients_is_its_own(world):
    """For a last batch of two rows too, of which a third process gets none."""
    data = blobs(82)
    with isolated(0, "test"):
        module = VaeModule(build_vae(data.image_shape, 3, "cnn"), config(), seed=0)
    parameters = list(module.parameters())

    def batches(share):
        order = torch.Generator().manual_seed(0)
        return Batches(data.images, data.maximum, torch.arange(data.size), 40, order, share)

    def gradients(batch):
        return torch.autograd.grad(module.training_step(batch, 0), parameters)

    shares = [batches(Share(rank, world)) for rank in range(world)]
    for whole, *parts in zip(batches(Share()), *shares, strict=True):
        assert sorted(i for part in parts if part.weight for i in part.ids.tolist()) == sorted(whole.ids.tolist())
        for expected, *found in zip(gradients(whole), *map(gradients, parts), strict=True):
            assert torch.allclose(sum(found) / world, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_two_processes_take_the_steps_that_one_takes(monkeypatch):
    """Five steps, the last of 28 rows, and an odd hold-out; variables that a launcher left do not matter."""
    data = blobs(199)
    settings = {"train_batch_size": 40, "max_epochs": 1, "holdout": 0.055}
    one, facts = train(data, 1, **settings)
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID")
    for name in names:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    before, steps = dict(os.environ), []
    two, others = train(data, 2, lambda *step: steps.append(step), **settings)
    assert difference(one, two) < 1e-5
    with isolated(0, "test"):
        assert difference(one.vae, build_vae(data.image_shape, 3, "cnn")) > 1e-3
    assert others == {**facts, "holdout_loss": pytest.approx(facts["holdout_loss"], rel=1e-5), "devices": 2}
    assert steps == [("starting 2 processes", 0, 1), ("VAE epoch", 1, 1)]
    assert not two.training
    assert dict(os.environ) == before


def test_more_gpus_than_there_are_is_an_error_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    expected = r"trainer\.devices=3, but torch sees 1 of them: use trainer\.devices=1"
    with pytest.raises(ConfigError, match=expected), torch.random.fork_rng(devices=[]):
        train_vae(blobs(), config(), 0, torch.device("cuda"), silent, devices=3)


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line():
    def kill(what, done, of):
        if what == "VAE epoch":
            multiprocessing.active_children()[0].kill()

    start = time.monotonic()
    message = r"^process [12] of the 2 that train the VAE was killed by SIGKILL: if memory ran out, lower trainer"
    with pytest.raises(UserError, match=message):
        train(blobs(), 2, kill, **FOR_EVER)
    assert time.monotonic() - start < 120
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_crash_is_one_line():
    with pytest.raises(RuntimeError, match=r"^process [12] of the 2 that train the VAE failed: \w+: .*-1$"):
        train(blobs(), 2, train_batch_size=-1)


def train_and_tell(sender):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a worker does

    def progress(what, done, of):
        sender.send((what, [process.pid for process in multiprocessing.active_children()]))

    train(blobs(), 2, progress, **FOR_EVER)


@in_proc
@pytest.mark.slow
def test_the_processes_of_a_killed_parent_end():
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    parent = fork.Process(target=train_and_tell, args=(sender,))
    parent.start()
    assert receiver.recv() == ("starting 2 processes", [])
    what, pids = receiver.recv()
    parent.kill()
    parent.join()
    assert (what, len(pids)) == ("VAE epoch", 2)
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
