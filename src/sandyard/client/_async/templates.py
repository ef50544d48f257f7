"""Templates of your own: built, followed and deleted."""

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace

from sandyard.client import templates
from sandyard.client._async.concurrency import content_of
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.models import (
    BuildLine,
    RegistryCredential,
    TemplateBuild,
    TemplateInfo,
    TemplateVersion,
)
from sandyard.client.templates import OnLine, Template


class AsyncTemplateMethods:
    """What a client does with templates; a part of `AsyncSandyard`."""

    _transport: AsyncTransport

    async def templates(self) -> list[TemplateInfo]:
        """Return the templates of the installation, and the organization's own."""
        return await self._transport.send(templates.listing())

    async def build(self, template: Template, *, on_line: OnLine | None = None) -> TemplateBuild:
        """Build a new version of a template, and return when it can be used. `on_line` is called
        with each line of the log.

        Raises:
            BuildFailedError: the build did not succeed.
            ApiError: the request is refused.
        """
        slug, build_id = await self.request_build(template)
        following = templates.Following(slug, build_id)
        async for line in self._transport.follow(following):
            if on_line is not None:
                on_line(line)
        return templates.ended(following)

    async def request_build(self, template: Template) -> tuple[str, str]:
        """Request a build, and return the slug and the build's id at once."""
        with ExitStack() as held:
            uploads = {
                name: await self._transport.send(
                    replace(templates.upload(one), content=content_of(one))
                )
                for name, one in template.files_to_send(held).items()
            }
        return await self._transport.send(templates.request(template.body(uploads)))

    def build_log(self, slug: str, build: str | None = None) -> AsyncIterator[BuildLine]:
        """Yield the log of a build, or of the latest one, as it is written."""
        return self._transport.follow(templates.Following(slug, build))

    async def builds(self, slug: str) -> list[TemplateBuild]:
        """Return the latest builds of a template, newest first."""
        return await self._transport.send(templates.builds(slug))

    async def cancel_build(self, slug: str, build: str) -> TemplateBuild:
        """Cancel a build."""
        return await self._transport.send(templates.cancel(slug, build))

    async def template_versions(self, slug: str) -> list[TemplateVersion]:
        """Return the versions of a template, newest first."""
        return await self._transport.send(templates.versions(slug))

    async def tag_template(self, slug: str, tag: str, version: int) -> None:
        """Give a version a tag, which another one loses."""
        await self._transport.send(templates.tag(slug, tag, version))

    async def untag_template(self, slug: str, tag: str) -> None:
        """Remove a tag."""
        await self._transport.send(templates.delete(slug, "tags", tag))

    async def delete_template(self, slug: str, version: int | None = None) -> None:
        """Delete a template, or one version of it. Its sandboxes are not affected."""
        parts = (slug,) if version is None else (slug, "versions", version)
        await self._transport.send(templates.delete(*parts))

    async def add_registry_credential(
        self, host: str, username: str, password: str
    ) -> RegistryCredential:
        """Keep a name and a password for a registry. Builds name it by its id."""
        return await self._transport.send(templates.add_credential(host, username, password))

    async def registry_credentials(self) -> list[RegistryCredential]:
        """Return the credentials for registries, newest first and without their passwords."""
        return await self._transport.send(templates.credentials())

    async def delete_registry_credential(self, credential: str) -> None:
        """Delete a credential."""
        await self._transport.send(templates.delete_credential(credential))
