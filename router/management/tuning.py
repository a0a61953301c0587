"""Access to the settings that can change while the mesh runs. `router.state.dynamic` follows the changes."""

from mesh.etcd import Etcd
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys
from mesh.statuses import MeshError, Reason
from router.state import dynamic


class Tuning:
    """Access to the mesh's settings through one worker."""

    def __init__(self, etcd: Etcd, keys: Keys) -> None:
        self._etcd = etcd
        self._keys = keys

    async def read(self) -> dict[str, str]:
        """Reads all settings from etcd. A setting that is not set is "". Raises REGISTRY_AWAY."""
        page = await self._etcd.page(self._keys.config, after_prefix(self._keys.config), limit=100)
        found = {self._keys.setting_of(kv.key): kv.value.decode(errors="replace") for kv in page.kvs}
        return {name: found.get(name, "") for name in dynamic.NAMES}

    async def write(self, name: str, text: str) -> None:
        """Writes a setting; "" removes it. Raises BAD_REQUEST, REGISTRY_AWAY."""
        check(name)
        try:
            dynamic.parse(name, text)
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, str(error)) from error
        if text.strip():
            await self._etcd.put(self._keys.setting(name), text.encode())
        else:
            await self._etcd.delete(self._keys.setting(name))


def check(name: str) -> None:
    """Checks that the setting exists. Raises BAD_REQUEST."""
    if name not in dynamic.NAMES:
        text = f"there is no setting {name[:80]!r}; the settings are {', '.join(dynamic.NAMES)}"
        raise MeshError(Reason.BAD_REQUEST, text)
