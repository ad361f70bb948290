"""A hub in memory, in place of huggingface_hub.HfApi."""

from __future__ import annotations

from typing import Any

from huggingface_hub import CommitOperationAdd


class FakeHub:
    """What HfApi does for us, kept in memory: {repository: {file: bytes}}."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def __call__(self, token: str | None = None) -> FakeHub:
        self.calls.append(("token", token))
        return self

    def repo_exists(self, repo_id: str) -> bool:
        if self.error is not None:
            raise self.error
        return repo_id in self.repos

    def create_repo(self, repo_id: str, private: bool | None = None) -> None:
        self.calls.append(("create", repo_id, private))
        self.repos[repo_id] = {".gitattributes": b""}

    def list_repo_files(self, repo_id: str, revision: str | None = None) -> list[str]:
        return sorted(self.repos[repo_id])

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str, revision: str | None) -> Any:
        self.calls.append(("commit", commit_message, revision))
        files = self.repos[repo_id]
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                with operation.as_file() as data:
                    files[operation.path_in_repo] = data.read()
            else:
                del files[operation.path_in_repo]

        class Commit:
            commit_url = f"https://hub/{repo_id}/commit/1"

        return Commit()
