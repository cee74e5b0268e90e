"""Settings that come from environment variables, and those of the client."""

import os
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError


class FromEnvironment(BaseModel):
    """Settings whose fields are environment variables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """The settings of this process. An empty variable counts as not set.

        Raises:
            ValueError: a value is not allowed; the message names the variable, never its value.
        """
        environ = os.environ if environ is None else environ
        names = {name: name.upper() for name in cls.model_fields}
        given = {
            name: environ[variable] for name, variable in names.items() if environ.get(variable)
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            problems = "; ".join(f"{str(e['loc'][0]).upper()}: {e['msg']}" for e in error.errors())
            raise ValueError(f"settings: {problems}") from None


class ClientSettings(FromEnvironment):
    """What `python -m avatar_client` finds in the environment."""

    runpod_api_key: SecretStr | None = None
    runpod_endpoint_id: str | None = None  # or the endpoint's base URL
