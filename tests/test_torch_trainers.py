"""Callbacks of trainers: the weights are those of a loop by hand, and nothing is left in place after training."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn
from torch_cases import same, weights

from onnx_optshift.torch import OptimumShift

STEPS = 7


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 5))


def samples():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8 * STEPS, 24, generator=generator), torch.arange(8 * STEPS) % 5


def by_hand(every):
    """The network after `STEPS` steps, shifted after every k-th; and as it is without."""
    model, (inputs, labels) = network(), samples()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with OptimumShift(model, every).attach(optimizer):
        for some, classes in zip(inputs.split(8), labels.split(8), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(some), classes).backward()
            optimizer.step()
    return model


def needs(name):
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@needs("transformers")
@needs("accelerate")
def test_the_trainer_of_hugging_face(tmp_path):
    from transformers import Trainer, TrainingArguments

    from onnx_optshift.integrations.huggingface import OptimumShiftCallback

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, inputs, labels=None):
            scores = self.inner(inputs)
            return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}

    inputs, labels = samples()
    data = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    model, callback = Wrapped(), OptimumShiftCallback(every=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        constant = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "train_sampling_strategy": "sequential"}
        quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
        sizes = {"per_device_train_batch_size": 8, "num_train_epochs": 1}
        arguments = TrainingArguments(str(tmp_path), use_cpu=True, **sizes, **constant, **quiet)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback], optimizers=(optimizer, None)).train()
    assert callback.shift.steps == STEPS
    assert same(weights(model.inner), weights(by_hand(3)))
    assert not same(weights(model.inner), weights(by_hand(STEPS + 1)))
    assert not optimizer._optimizer_step_post_hooks


@needs("lightning")
def test_the_trainer_of_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning.pytorch import LightningModule, Trainer

        from onnx_optshift.integrations.lightning import OptimumShiftCallback

    class Wrapped(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.inner(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples()), 8)
    model, callback = Wrapped(), OptimumShiftCallback(every=3)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Trainer(accelerator="cpu", max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **quiet).fit(
            model, data
        )
    assert [shift.steps for shift in callback.shifts] == [STEPS]
    assert same(weights(model.inner), weights(by_hand(3)))
    assert not same(weights(model.inner), weights(by_hand(STEPS + 1)))
    assert not any(module._forward_pre_hooks for module in model.modules())
