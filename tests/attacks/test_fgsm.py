"""FGSM against the code of others."""

import numpy as np
import pytest
import torch
from attack_cases import CLASSES, case
from torch import nn

from videopure_fast.attacks import fgsm


def test_fgsm_equals_arts():
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    model, video, labels = case(4)
    for norm, order in (("linf", np.inf), ("l2", 2)):
        wrapped = estimators.PyTorchClassifier(
            model, nn.CrossEntropyLoss(), (3, 4, 8, 8), CLASSES, clip_values=(0.0, 1.0), device_type="cpu"
        )
        theirs = evasion.FastGradientMethod(wrapped, norm=order, eps=0.03).generate(video.numpy(), labels.numpy())
        ours = fgsm(model, video, labels, eps=0.03, norm=norm)
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=2e-6)
        assert not torch.allclose(ours, video, atol=1e-4)
