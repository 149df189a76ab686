"""LPIPS against the lpips package: its own heads, and an AlexNet trunk with random weights."""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from worldr1_jax.models import lpips as ours

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


def alexnet(seed):
    """torchvision's AlexNet.features, which the package asks torchvision for."""
    torch.manual_seed(seed)
    layers, relu = [], lambda: torch.nn.ReLU(inplace=False)
    for number, kernel, stride, padding, inputs, outputs in ours.CONVOLUTIONS:
        layers.append(torch.nn.Conv2d(inputs, outputs, kernel, stride, padding))
        layers.append(relu())
        if number in (0, 3, 10):
            layers.append(torch.nn.MaxPool2d(3, 2))
    return torch.nn.Sequential(*layers)


def package_on(trunk):
    """The package's network with its own heads; torchvision is replaced by what it needs of it."""
    vision = types.ModuleType("torchvision")
    vision.models = types.ModuleType("torchvision.models")
    vision.models.alexnet = lambda pretrained: types.SimpleNamespace(features=trunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", vision)
        patch.setitem(sys.modules, "torchvision.models", vision.models)
        lpips = pytest.importorskip("lpips")
        return lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)


@pytest.mark.parametrize("size", [(64, 64), (47, 90)])
def test_distances(size, tmp_path):
    trunk = alexnet(0)
    network = package_on(trunk)
    state = {f"features.{k}": v for k, v in trunk.state_dict().items()}
    state |= {
        k: v for k, v in network.state_dict().items() if k.startswith("lin") and "s." not in k
    }
    state["classifier.1.weight"] = torch.zeros(2, 2)  # the rest of AlexNet may be in the file
    from safetensors.numpy import save_file

    tensors = {k: np.ascontiguousarray(v.numpy()) for k, v in state.items()}
    save_file(tensors, tmp_path / ours.FILENAME)
    model = ours.load(tmp_path)
    a, b = np.random.default_rng(0).random((2, 3, *size, 3), np.float32)
    b[0] = a[0]
    theirs = network(
        *(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (a, b)), normalize=True
    )
    theirs = theirs.detach().numpy().ravel()
    got = np.asarray(model(jnp.asarray(a), jnp.asarray(b)))
    assert got[0] == theirs[0] == 0
    # float32 convolutions in another order of summation
    np.testing.assert_allclose(got, theirs, rtol=1e-4, atol=1e-7)


def test_the_folder_is_made_of_the_published_files(tmp_path):
    """The package's own heads, and a trunk in torch's format from before 1.6, as both are."""
    from worldr1_jax.models import lpips_files

    pytest.importorskip("lpips")
    trunk = {f"features.{k}": v for k, v in alexnet(0).state_dict().items()}
    whole = trunk | {"classifier.1.weight": torch.zeros(2, 2)}
    torch.save(whole, tmp_path / "alexnet.pth", _use_new_zipfile_serialization=False)
    lpips_files.main([f"--trunk={tmp_path / 'alexnet.pth'}", f"--folder={tmp_path / 'lpips'}"])
    kernel = ours.load(tmp_path / "lpips").trunk[0].kernel[...]
    want = trunk["features.0.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(np.asarray(kernel), want)
