"""What the tests share: the marker `full`, and torchvision, importable on a torch without CUDA too."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers are the parallelism, here and in what the tests start

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the reference libraries only see files that a test has written


def pytest_configure(config):
    """The marker of what CI leaves out."""
    config.addinivalue_line("markers", "full: real sizes and slow doubles; only run with -m full")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is marked full, saying so, unless -m asks for it."""
    if "full" not in config.getoption("-m"):
        reason = "real sizes or slow: python -m pytest tests -m full -s (minutes, 6 GB of memory and disk)"
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def import_torchvision():
    """torchvision; its wheel on a CPU-only torch imports only once its compiled operators have been declared.

    Call it before diffusers or transformers are imported: both import torchvision where it is installed."""
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed: see tests/requirements.txt")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        pairs = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
        for name in ("nms", "qnms", *pairs, *(f"_{pair}_backward" for pair in pairs)):
            library.define(f"{name}(Tensor a) -> Tensor")
        import_torchvision.library = library  # the declarations last as long as this object
        import torchvision
    return torchvision
