import subprocess
import sys

import pytest
import torch
from conftest import clips

from videopure_fast.models.flow import RaftFlow, dis_flow, flow_name, load_flow, no_flow, resize_flow


def shifted_pair(height, width, dx, dy):
    """A smooth texture and the same texture moved by (dx, dy) pixels."""
    big = clips(1, 3, height // 4 + 4, width // 4 + 4)
    big = torch.nn.functional.interpolate(big, scale_factor=4, mode="bicubic").clamp(0, 1)
    return big[..., 8 : 8 + height, 8 : 8 + width], big[..., 8 - dy : 8 - dy + height, 8 - dx : 8 - dx + width]


@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (0, -2), (1, 1)])
def test_dis_points_from_prev_to_next(dx, dy):
    flow = dis_flow(*shifted_pair(48, 64, dx, dy))
    assert flow.shape == (1, 2, 48, 64) and flow.dtype == torch.float32
    inner = flow[0, :, 12:-12, 12:-12].mean((1, 2))
    assert inner.tolist() == pytest.approx([dx, dy], abs=0.3)


def test_dis_pairs_are_independent():
    prev, next = clips(3, 3, 40, 40), clips(3, 3, 40, 40, seed=1)
    together = dis_flow(prev, next)
    assert torch.equal(together[1:2], dis_flow(prev[1:2], next[1:2]))


def test_dis_survives_small_and_elongated_pictures():
    # In a process of its own: a fault in OpenCV's pyramid ends the process.
    code = (
        "import torch; from videopure_fast.models.flow import dis_flow\n"
        "for size in ((16, 200), (200, 16), (16, 16), (24, 128), (17, 31)):\n"
        "    assert dis_flow(torch.rand(2, 3, *size), torch.rand(2, 3, *size)).shape == (2, 2, *size)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names():
    assert load_flow("dis") is dis_flow and load_flow("none") is no_flow and load_flow(no_flow) is no_flow
    assert flow_name(dis_flow) == "dis" and flow_name(no_flow) == "none" and flow_name(lambda a, b: a) is None
    assert torch.equal(no_flow(clips(2, 3, 16, 18), clips(2, 3, 16, 18)), torch.zeros(2, 2, 16, 18))
    with pytest.raises(ValueError, match="accepted: dis, raft, none"):
        load_flow("horn")


class RecordingRaft(torch.nn.Module):
    """Takes what torchvision's RAFT takes, remembers it, and returns a flow that counts pixels."""

    def forward(self, prev, next, num_flow_updates):
        self.seen = prev, next, num_flow_updates
        size = prev.shape[-2:]
        last = torch.arange(2 * size[0] * size[1], dtype=torch.float32).view(1, 2, *size).expand(len(prev), -1, -1, -1)
        return [torch.zeros_like(last), last]


@pytest.mark.parametrize("normalize", [False, True])
def test_raft_wiring(normalize):
    model = RecordingRaft()
    raft = RaftFlow(model, normalize=normalize)
    prev, next = clips(2, 3, 20, 132), clips(2, 3, 20, 132, seed=1)
    flow = raft(prev, next)
    assert flow.shape == (2, 2, 20, 132)
    assert flow_name(raft) is None  # a network of the caller's own has no name to load it by
    seen_prev, seen_next, updates = model.seen
    assert seen_prev.shape == seen_next.shape == (2, 3, 128, 136) and updates == 10
    expected = 2 * next - 1 if normalize else next
    assert torch.equal(seen_next[..., :20, :132], expected)
    assert torch.equal(seen_next[..., 127, :132], expected[..., 19, :])  # replicated below
    assert torch.equal(flow[0, 0, 1, :3], torch.tensor([136.0, 137.0, 138.0]))


def test_raft_without_torchvision_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ImportError, match="flow='dis'"):
        load_flow("raft")


def test_raft_of_torchvision_with_random_weights():
    pytest.importorskip("torchvision", reason="torchvision is optional, and has no build for every torch")
    from torchvision.models.optical_flow import raft_large

    flow = RaftFlow(raft_large(weights=None))(clips(1, 3, 40, 136), clips(1, 3, 40, 136, seed=1))
    assert flow.shape == (1, 2, 40, 136) and flow.isfinite().all()


def test_dis_without_opencv_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="flow='none'"):
        load_flow("dis")


def test_resize_scales_each_component_by_its_own_axis():
    flow = torch.ones(1, 2, 32, 64)
    small = resize_flow(flow, 8, 32)
    assert torch.equal(small[:, 0], torch.full((1, 8, 32), 0.5))
    assert torch.equal(small[:, 1], torch.full((1, 8, 32), 0.25))
