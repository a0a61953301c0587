"""Statuses of models and vmodels, in the words of ModelMesh's API."""

import enum


class ModelStatus(enum.StrEnum):
    """The status of a model, or of one of its copies. The names are those of `mmesh.ModelStatusInfo.ModelStatus`."""

    NOT_FOUND = "NOT_FOUND"
    NOT_LOADED = "NOT_LOADED"
    LOADING = "LOADING"
    LOADED = "LOADED"
    LOADING_FAILED = "LOADING_FAILED"

    @property
    def has_copies(self) -> bool:
        """True if replies list copies of a model with this status: loaded, loading or failed."""
        return self in (ModelStatus.LOADED, ModelStatus.LOADING, ModelStatus.LOADING_FAILED)


class VModelStatus(enum.StrEnum):
    """The status of a vmodel. The names are those of `mmesh.VModelStatusInfo.VModelStatus`."""

    NOT_FOUND = "NOT_FOUND"
    DEFINED = "DEFINED"
    TRANSITIONING = "TRANSITIONING"
    TRANSITION_FAILED = "TRANSITION_FAILED"
