"""What no log and no message may show: queries of URLs, keys, signatures, media."""

import re

# The whole of any URL, so that each letter is read once however many URLs a hostile text holds.
_URL = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)(?P<user>[^\s/?@\"'<>]+@)?(?P<path>[^\s?\"'<>]*)"
    r"(?P<query>\?[^\s\"'<>]*)?",
    re.IGNORECASE,
)
_NAME = (
    r"(?:access[_-]?(?:key(?:[_-]?id)?|id|secret|token)|secret\w{0,30}+|api[_-]?key|pass(?:word|wd|phrase)"
    r"|token|credentials?|private[_-]?key|key[_-]pair[_-]id|input_value"
    r"|authorization(?=[\"'\\]*\s*[:=]\s*+[\"'\\]*+(?!bearer|basic)))"
)
_SECRETS = [
    (re.compile(r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)[\s\S]*?(?=-----END|$)"), r"\1..."),
    # a signature without its URL, and the header that carries one
    (
        re.compile(
            r"((?:X-Amz-\w+|X-Goog-\w+|AWSAccessKeyId|GoogleAccessId|Key-Pair-Id"
            r"|\b(?:Signature|Credential|Policy|sig))=)[^\s&,\"'<>]+"
        ),
        r"\1...",
    ),
    (re.compile(r"\b(Bearer|Basic|bearer)\s+[\w.~+/=-]+"), r"\1 ..."),
    # a secret by its name, in quotes: those of JSON, of JSON inside JSON, of Python. It ends at the
    # same quote, if that ends a value there, else with the line.
    (
        re.compile(
            rf"({_NAME}(?:\\*[\"'])?\s*[:=]\s*(?P<quote>\\*[\"']))"
            r"(?:(?!(?P=quote)(?:[\s,;:&)}\]\\\"']|$)).)*",
            re.IGNORECASE,
        ),
        r"\1...",
    ),
    # the same without quotes, as in a header or the environment
    (re.compile(rf"({_NAME}[\"'\\]*\s*[:=]\s*)[^\s\"',;}}&\\]+", re.IGNORECASE), r"\1..."),
    # by their shapes
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), "..."),
    (
        re.compile(r"\b(?:hf|rpa|rps|gh[opsu])_(?=[A-Za-z]*[0-9]|[A-Za-z]{20})[A-Za-z0-9]{8,}"),
        "...",
    ),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), "..."),  # a JSON web token
    # the secret key of AWS: 40 characters, which are more than the hexadecimal digits of a commit
    (
        re.compile(
            r"(?<![\w/+=.-])(?=[a-z0-9/+]*[A-Z])(?=[A-Z0-9/+]*[a-z])(?=[A-Za-z/+]*[0-9])"
            r"[A-Za-z0-9/+]{40}(?![\w/+=.-])"
        ),
        "...",
    ),
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
