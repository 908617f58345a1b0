from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What compiled networks are called with. Compiling takes most of a minute on a CPU, so that another network stands for
    the compiled one."""
    calls: list[Any] = []

    def compiled(original: nn.Module) -> Any:
        def network(*given: Any) -> Tensor:
            calls.append(given)
            found: Tensor = original(*given)
            return found

        return network

    monkeypatch.setattr(torch, "compile", compiled)
    return calls
