"""Small models on the Hub: loaded with clear errors, pushed with a card."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, Self

from mctd_diffusers.hub import documents_beside, loading, push_folder

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class HubModel:
    """Mixin for a `ModelMixin, ConfigMixin`, before these."""

    config: Any
    save_pretrained: Any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        r"""Load the model from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                The folder, or the name of the repository.
            kwargs (remaining keyword arguments, *optional*):
                Everything that [`~diffusers.ModelMixin.from_pretrained`] takes: `revision`,
                `token`, `subfolder` (`"ige"` or `"feature_decoder"` for that of a pipeline),
                `dtype`, ...

        Raises:
            ConfigError: there is no such folder or repository, or it holds no such model that can
                be read.
        """
        above: Any = super()
        with loading(cls.__name__, pretrained_model_name_or_path, kwargs):
            model: Self = above.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return model

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> CommitInfo:
        r"""Push the model with a card.

        Documents in the folder that it was loaded from, such as the card with the figures of its
        training, are pushed too; without a card there, the repository keeps its own, or gets
        :meth:`card`.

        Args:
            repo_id (`str`):
                `owner/name`, or `name` in the account of the token; made if it does not exist.
            commit_message (`str`, *optional*):
                Message of the commit.
            private (`bool`, *optional*, defaults to what the account's settings say):
                Whether a new repository is private.
            token (`str`, *optional*, defaults to the saved one):
                Token of an account that may write there.
            create_pr (`bool`, *optional*, defaults to `False`):
                Whether to open a pull request in place of writing to the main branch.
            safe_serialization (`bool`, *optional*, defaults to `True`):
                Whether to write safetensors.
            variant (`str`, *optional*):
                Written into the name of the weights.
            subfolder (`str`, *optional*, defaults to the root):
                Folder of the repository to write to.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the address of the commit, with its hash as `oid`.

        Raises:
            ConfigError: the Hub cannot be reached, or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            for path in documents_beside(self.config.get("_name_or_path")).values():
                shutil.copy(path, folder)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                create_pr=create_pr,
                path_in_repo=subfolder,
                card=None if subfolder else self.card,
            )

    def card(self, repo_id: str, **metadata: Any) -> str:
        """Model card of what the model was trained on, and how to load it.

        Args:
            repo_id: name of its repository.
            metadata: further entries of the card's head, such as `base_model` and `license`.
        """
        raise NotImplementedError  # each model says what it learned from
