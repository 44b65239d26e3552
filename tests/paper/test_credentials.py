"""URLs with a key, a password or a token in them are refused before anything writes them down."""

import pytest

from deepseek_train.cli.compose import compose_config
from deepseek_train.config.check import check
from deepseek_train.config.credentials import holds_credentials
from deepseek_train.config.parse import ConfigError
from tests.paper.runs import run_config


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:s3cr3t@bucket/run",
        "s3://AKIA:s3/cr3+t@bucket/run",
        "simplecache::s3://AKIA:s3cr3t@bucket/run",
        "ftp://user:@host/run",
        "https://host/run?X-Amz-Credential=a&X-Amz-Signature=b",
        "https://host/run?sv=2024&sig=s3cr3t",
        "abfs://container/run?sas_token=s3cr3t",
        "s3://bucket/run?endpoint=x#access_key=s3cr3t",
        "https://host/run?ACCESS_TOKEN=s3cr3t",
        "https://host/run?apiKey=s3cr3t&user=me",
        "https://host/run?pwd=s3cr3t",
        "https://s3cr3t@host/run",
    ],
)
def test_what_is_refused(url: str) -> None:
    assert holds_credentials(url)
    for where in ("checkpoint__path", "init_from", "data__source"):
        (problem,) = check(run_config(**{where: url}))
        assert problem.where == where.replace("__", ".")
        assert "AWS_SECRET_ACCESS_KEY" in problem.mend
        assert "s3cr3t" not in str(problem)


@pytest.mark.parametrize(
    "url",
    [
        "runs/tiny",
        "/a:b/c@d",
        "s3://bucket/run",
        "hdfs://host:8020/user@realm/run",
        "abfs://container@account.dfs.core.windows.net/run",
        "ssh://user@host/run",
        "https://host/run?version=3",
        "memory://bucket/a?b",
        "https://host/run?monkey=1&author=me",
    ],
)
def test_what_is_not(url: str) -> None:
    assert not holds_credentials(url)
    assert check(run_config(checkpoint__path=url, init_from=url)) == []


@pytest.mark.parametrize(
    "override",
    [
        "checkpoint.path=abfs://c/run?sas_token=s3cr3t",
        "init_from=[s3://K:s3cr3t@b",
        "checkpoint=s3://K:s3cr3t@b/x",
    ],
)
def test_what_cannot_be_read_is_not_repeated_either(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(["experiment=tiny", override])
    assert "s3cr3t" not in str(error.value)
    assert override.partition("=")[0] in str(error.value)
