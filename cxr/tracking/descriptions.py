"""The descriptions of registered models and their versions, as MLflow shows them."""

from __future__ import annotations

import hashlib

LONGEST = 5000  # characters: the column of MLflow's tables
OF_CHAMPION = "Card of version {version}, champion when this was written; the alias `champion` says which one is now."
WRITTEN = "cxr.card"  # the tag of a registered model that tells our description from one that a person wrote


def describe_version(name: str, version: str, text: str) -> None:
    """Make `text` the description of a version that has none."""
    import mlflow

    client = mlflow.MlflowClient()
    if not client.get_model_version(name, version).description:
        client.update_model_version(name, version, text)


def describe_model(name: str) -> None:
    """Make the description of its champion that of a registered model, unless a person wrote another one.

    A version that older code registered has none; the model's description then says so.
    """
    import mlflow

    client = mlflow.MlflowClient()
    model = client.get_registered_model(name)
    champion, own = model.aliases.get("champion"), model.tags.get(WRITTEN)
    if champion is None or (model.description and own != _digest(model.description)):
        return
    none = f"Version {champion} was registered without a card; `cxr models export` writes one."
    card = client.get_model_version(name, champion).description or none
    text = f"{OF_CHAMPION.format(version=champion)}\n\n{card}"
    client.update_registered_model(name, text)
    client.set_registered_model_tag(name, WRITTEN, _digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
