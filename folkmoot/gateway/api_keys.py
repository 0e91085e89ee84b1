"""API keys: shown once, kept in the store as hashes, checked by gateways against a copy that is FRESH_S old at most.

A key is `fmk_ID_SECRET`. The id finds the record; the secret is 256 random bits, of which the store has the SHA-256.
A slow, salted hash is for secrets that people choose and others can guess: nobody guesses 256 random bits, and a
gateway has to check one with every call. Hashes are compared in constant time.

Who can write to the store can make keys, so that `folkmoot keys` needs no key: it needs the store.
"""

import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from folkmoot.gateway.errors import GatewayError, InvalidApiKey, StoreRefused
from folkmoot.gateway.limits import NO_LIMITS, Limits

if TYPE_CHECKING:
    from folkmoot.gateway.store import Store

ROLES = ("generate", "batch", "status", "admin")
TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"fmk_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")

FRESH_S = 2.0
"""What is changed about a key (revoked, rotated) holds at every gateway after so long."""
MAX_CACHED = 4096
OVERLAP_S = 24 * 3600.0
MAX_OVERLAP_S = 366 * 24 * 3600.0


class UnknownKey(GatewayError):
    """There is no key of this id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"no API key has the id {key_id!r}")


class KeyChanged(GatewayError):
    """Someone else has changed the key at the same moment."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"the API key {key_id!r} was changed by someone else at the same moment; look at it again")


@dataclass(frozen=True)
class Hash:
    """The SHA-256 of a secret, and until when it is good (Unix seconds; None: as long as the key)."""

    sha256: str = field(repr=False)
    until_s: float | None = None


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; times in Unix seconds. Raises ValueError for what a key cannot be."""

    id: str
    tenant: str
    roles: tuple[str, ...]
    hashes: tuple[Hash, ...]
    limits: Limits = NO_LIMITS
    created_s: float = 0.0
    expires_s: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not TENANT.fullmatch(self.tenant):
            raise ValueError(f"tenant must be 1 to 64 characters of A-Z a-z 0-9 . _ -, is {self.tenant!r}")
        if not self.roles or set(self.roles) - set(ROLES):
            raise ValueError(f"roles must be some of {', '.join(ROLES)}, are {', '.join(self.roles) or 'none'}")
        if len(self.note) > 256:
            raise ValueError(f"note must have at most 256 characters, has {len(self.note)}")

    def has_expired(self, now_s: float) -> bool:
        """Whether its time is over."""
        return self.expires_s is not None and now_s >= self.expires_s

    def accepts(self, secret: str, now_s: float) -> bool:
        """Whether this is the secret of a key that is good now."""
        mine = _hash(secret)
        is_one = False
        for known in self.hashes:  # all of them, whichever it is
            is_good = known.until_s is None or now_s < known.until_s
            is_one |= hmac.compare_digest(mine, known.sha256) and is_good
        return is_one and not self.has_expired(now_s)

    def to_json(self) -> str:
        """As JSON; `from_json` makes an equal one of it."""
        return json.dumps({**asdict(self), "limits": self.limits.given()})

    @staticmethod
    def from_json(text: str | bytes) -> "ApiKey":
        """What `to_json` wrote. Raises StoreRefused for anything else."""
        try:
            raw: dict[str, Any] = json.loads(text)
            hashes = tuple(Hash(**one) for one in raw.pop("hashes"))
            limits, roles = Limits(**raw.pop("limits")), tuple(raw.pop("roles"))
            return ApiKey(**raw, roles=roles, hashes=hashes, limits=limits)
        except (ValueError, TypeError, KeyError, AttributeError):  # their words may have parts of the record
            raise StoreRefused("the record of an API key cannot be read: of another version, or damaged") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyStore:
    """All keys of one Folkmoot. Every method may raise StoreError."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._key = store.keys.api_keys

    async def create(
        self,
        tenant: str,
        roles: Sequence[str],
        limits: Limits | None = None,
        expires_s: float | None = None,
        note: str = "",
    ) -> tuple[ApiKey, str]:
        """A new key, and what its holder sends: it is not to be had again. Raises ValueError."""
        secret = secrets.token_urlsafe(32)
        key = ApiKey(
            id=secrets.token_hex(6),
            tenant=tenant,
            roles=tuple(sorted(set(roles), key=lambda role: ROLES.index(role) if role in ROLES else -1)),
            hashes=(Hash(_hash(secret)),),
            limits=limits or NO_LIMITS,
            created_s=time.time(),
            expires_s=expires_s,
            note=note,
        )
        await self._swap(key.id, b"", key.to_json())
        return key, f"fmk_{key.id}_{secret}"

    async def all(self) -> list[ApiKey]:
        """Every key, the oldest first."""
        flat = await self._store.command("HGETALL", self._key)
        return sorted((ApiKey.from_json(text) for text in flat[1::2]), key=lambda key: key.created_s)

    async def find(self, key_id: str) -> ApiKey | None:
        """The key of this id."""
        text = await self._store.command("HGET", self._key, key_id)
        return None if text is None else ApiKey.from_json(text)

    async def revoke(self, key_id: str) -> None:
        """No gateway takes it any more, FRESH_S from now at the latest. Raises UnknownKey."""
        if not await self._store.command("HDEL", self._key, key_id):
            raise UnknownKey(key_id)

    async def rotate(self, key_id: str, overlap_s: float = OVERLAP_S) -> tuple[ApiKey, str]:
        """A new secret for a key; what was good stays so for `overlap_s`. Raises UnknownKey, KeyChanged, ValueError."""
        if not 0 <= overlap_s <= MAX_OVERLAP_S:
            raise ValueError(f"the overlap must be between 0 and {MAX_OVERLAP_S:.0f} seconds, is {overlap_s:g}")
        old = await self._store.command("HGET", self._key, key_id)
        if old is None:
            raise UnknownKey(key_id)
        secret, now_s = secrets.token_urlsafe(32), time.time()
        key = with_secret(ApiKey.from_json(old), _hash(secret), now_s, overlap_s)
        await self._swap(key_id, old, key.to_json())
        return key, f"fmk_{key.id}_{secret}"

    async def _swap(self, key_id: str, old: bytes, new: str) -> None:
        if not await self._store.run("swap_key", key_id, old, new):
            raise KeyChanged(key_id)


def with_secret(key: ApiKey, sha256: str, now_s: float, overlap_s: float) -> ApiKey:
    """The key with one more secret; those that it had end after the overlap, and what has ended is left out."""
    ends_s = now_s + overlap_s
    old = (Hash(h.sha256, ends_s if h.until_s is None else min(h.until_s, ends_s)) for h in key.hashes)
    kept = tuple(h for h in old if h.until_s is not None and h.until_s > now_s)
    return replace(key, hashes=(*kept, Hash(sha256)))


class KeyRing:
    """A gateway's copy of the keys that it has seen, each FRESH_S old at most."""

    def __init__(self, store: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._seen: OrderedDict[str, tuple[ApiKey | None, float]] = OrderedDict()

    async def check(self, text: str) -> ApiKey:
        """The key that this is. Raises InvalidApiKey, which does not say what is wrong with it, and StoreError."""
        match = KEY.fullmatch(text)
        key = await self._find(match[1]) if match else None
        secret = match[2] if match else ""
        if not (key or NOBODY).accepts(secret, time.time()) or key is None:
            raise InvalidApiKey
        return key

    async def _find(self, key_id: str) -> ApiKey | None:
        key, seen_s = self._seen.get(key_id, (None, float("-inf")))
        if self._clock() - seen_s > FRESH_S:
            asked_s = self._clock()
            key = await self._store.find(key_id)
            self._seen[key_id] = key, asked_s
            self._seen.move_to_end(key_id)
            if len(self._seen) > MAX_CACHED:
                self._seen.popitem(last=False)
        return key


NOBODY = ApiKey("0" * 12, "nobody", ROLES, (Hash(_hash(secrets.token_urlsafe(32))),))
"""Whose secret is compared where there is no key of an id, so that it takes as long."""
