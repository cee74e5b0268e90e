"""What no log and no message may show: queries of URLs, keys, signatures, media."""

import re

# The whole of any URL, so that each letter is read once however many URLs a hostile text holds.
_URL = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)(?P<user>[^\s/?@\"'<>]+@)?(?P<path>[^\s?\"'<>]*)"
    r"(?P<query>\?[^\s\"'<>]*)?",
    re.IGNORECASE,
)
_SECRETS = [
    # a signature without its URL, and the header that carries one
    (
        re.compile(r"((?:X-Amz-\w+|X-Goog-\w+|AWSAccessKeyId|Signature|Credential)=)[^\s&,\"'<>]+"),
        r"\1...",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]+"), r"\1 ..."),
    # a key by its name, in JSON, Python or environment form
    (
        re.compile(
            r"((?:access_?key(?:_?id)?|secret\w{0,30}|access_?id|access_?secret|api_?key|password"
            r"|token)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;}&]+",
            re.IGNORECASE,
        ),
        r"\1...",
    ),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "..."),
    # media inside a request, or inside a result
    (re.compile(r"[A-Za-z0-9+/_-]{200,}={0,2}"), "<base64>"),
]


def redact(text: str) -> str:
    """The text without queries of URLs, access keys, signatures and long base64."""
    text = _URL.sub(_without_query, text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _without_query(url: re.Match[str]) -> str:
    user, query = ("...@" if url["user"] else ""), ("?..." if url["query"] else "")
    return url["scheme"] + user + url["path"] + query
