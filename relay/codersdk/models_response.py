"""What the server says when it refuses, and who it says it is."""

from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.model import CoderModel, Omit


class ValidationError(CoderModel):
    """What is wrong with one field of a request. Go: `codersdk.ValidationError`."""

    field: str = ""
    detail: str = ""

    def __str__(self) -> str:
        """Go: `codersdk.ValidationError.Error`."""
        return f"field: {self.field} detail: {self.detail}"


class Response(CoderModel):
    """Why the server refused. Go: `codersdk.Response`."""

    message: str = ""
    detail: Omit[str] = ""
    validations: Omit[list[ValidationError]] = Field(default_factory=list)


class User(CoderModel):
    """The part of a user that says who it is; the rest is in `model_extra`. Go: `codersdk.User`."""

    id: UUID = NIL_UUID
    username: str = ""
    name: Omit[str] = ""
    email: str = ""
    status: str = ""
    organization_ids: list[UUID] | None = None


class BuildInfo(CoderModel):
    """Which server it is; the rest is in `model_extra`. Go: `codersdk.BuildInfoResponse`."""

    version: str = ""
    external_url: str = ""
    dashboard_url: str = ""
    deployment_id: str = ""
