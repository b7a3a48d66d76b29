"""Every error that is the user's to mend: one sentence that says what was wrong and what to do.

The CLI prints these without a traceback; anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations


class OnekernelError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class InvalidRequest(OnekernelError, ValueError):
    """A parameter, prompt or message has a value that cannot be used; the message names it."""

    exit_code = 2


class ModelNotFound(OnekernelError):
    """The named model is not on this machine and could not be downloaded; the message says what to do."""


class UnsupportedModel(OnekernelError):
    """The checkpoint is of an architecture or format that onekernel does not run; the message says what it runs."""


class CheckpointError(OnekernelError):
    """A file of the checkpoint is damaged, incomplete or inconsistent; the message names file and tensor."""


class NotEnoughMemory(OnekernelError):
    """The model or context does not fit; the message names the bytes needed and the bytes free."""


class BackendError(OnekernelError):
    """The backend cannot run here, or failed while running; the message says why and what to do."""
