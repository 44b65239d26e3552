"""Keys, passwords and tokens in URLs. A configuration is copied to config.yaml, report.md, wandb and log lines, where
they would stay for anybody to read: they are refused, and never repeated in a message.
"""

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

from deepseek_train.config.parse import Problem
from deepseek_train.config.schema import RunConfig

MEND = (
    "Leave them out of the URL: what opens it finds them in the environment. s3: AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or ~/.aws; gs: GOOGLE_APPLICATION_CREDENTIALS; any other, by the names of its fsspec "
    "arguments: FSSPEC_S3_KEY, FSSPEC_ABFS_SAS_TOKEN, ..."
)
# user:password@, of which the password may hold slashes (host:port/ is none), and token@ of the web.
_USER = re.compile(r"://[^/@:]*:(?!\d{1,5}(?:/|$))[^@]*@|https?://[^/@]+@")
# Words of a parameter's name, as in access_key, X-Amz-Signature or apiKey.
_SECRET = {
    *("key", "secret", "token", "password", "passwd", "pwd"),
    *("credential", "credentials", "signature", "sig", "auth"),
}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def holds_credentials(url: str) -> bool:
    """Whether there is a password before a host, or a parameter whose name sounds like one."""
    after = re.split(r"[?#]", url, maxsplit=1)
    names = (
        [name for name, _ in parse_qsl(after[1].replace("#", "&"), keep_blank_values=True)]
        if after[1:]
        else []
    )
    return bool(_USER.search(url)) or any(
        not _SECRET.isdisjoint(word.lower() for word in _WORDS.findall(name)) for name in names
    )


def credential_problems(run: RunConfig) -> Iterator[Problem]:
    """Of all places of a run that may be URLs."""
    for where, url in (
        ("checkpoint.path", run.checkpoint.path),
        ("init_from", run.init_from),
        ("data.source", run.data.source),
    ):
        if url is not None and holds_credentials(url):
            yield Problem(where, "holds a key, a password or a token, which the run would write down", MEND)
