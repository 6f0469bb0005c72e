"""Each point through the network at most once, in the order asked for, without a trace on its training state."""

import torch

from dgal_bench.conformance import example_config
from dgal_bench.core.clock import Stopwatch
from dgal_bench.data.pool import Pool
from dgal_bench.experiment import Run
from dgal_bench.models.predict import Predictor


def predictor(experiment, module=None):
    run = Run.of(example_config("margin", "predict_batch_size=7"), experiment)
    pool = Pool(experiment.data.size, 10, torch.tensor([0, 1]), experiment.data.labels[:2])
    module = module or run.new_module(0)
    return Predictor(module, run.datamodule(pool, 0), experiment.device, Stopwatch()), module


def test_outputs_are_the_networks_in_the_order_asked(experiment):
    predict, module = predictor(experiment)
    ids = torch.tensor([50, 3, 120, 4, 99, 7, 8, 61, 5])
    outputs = predict(ids)
    with torch.no_grad():
        logits, features = module.net(experiment.transform(experiment.data.images[ids]))
    assert torch.allclose(outputs.log_probs, torch.log_softmax(logits, 1), atol=1e-6)
    assert torch.allclose(outputs.features, features, atol=1e-6)
    assert torch.allclose(outputs.probs.sum(1), torch.ones(9))
    assert features.shape == (9, 50)


def test_a_point_is_scored_once_however_often_it_is_asked_for(experiment):
    predict, module = predictor(experiment)
    passed = []
    module.net.register_forward_hook(lambda net, inputs, outputs: passed.append(len(inputs[0])))
    first = predict(torch.tensor([5, 9, 5, 2]))
    second = predict(torch.tensor([2, 30, 5, 30]))
    assert predict.n_scored == sum(passed) == 4
    assert torch.equal(first.log_probs[0], first.log_probs[2])
    assert torch.equal(second.log_probs[[0, 2]], first.log_probs[[3, 0]])


def test_the_network_is_asked_in_eval_mode_without_gradients(experiment):
    predict, module = predictor(experiment)
    module.train()
    predict, module = predictor(experiment, module)
    outputs = predict(torch.arange(20))
    assert not module.training
    assert not outputs.log_probs.requires_grad


def test_every_network_answers_for_itself(experiment):
    """Nothing is kept from the predictor of one round for that of the next, on the same points."""
    run, ids = Run.of(example_config("margin"), experiment), torch.arange(20)
    for round_ in (0, 1):
        predict, module = predictor(experiment, run.new_module(round_))
        outputs = predict(ids)
        with torch.no_grad():
            logits, _ = module.net(experiment.transform(experiment.data.images[ids]))
        assert torch.allclose(outputs.log_probs, torch.log_softmax(logits, 1), atol=1e-6)
        assert predict.n_scored == len(ids)
