"""boto3's session for a bucket whose keys and place are known. Needs boto3, as its callers do."""

import boto3.session
import botocore.session
from botocore.configprovider import ConstantProvider


def session() -> boto3.session.Session:
    """A session of boto3 that reads neither `AWS_*` variables nor files of this machine's user.

    Else an `AWS_PROFILE` that is not there, or a setting meant for something else, would end or
    change every upload.
    """
    variables = {
        name: (None, None, default, None)
        for name, (_, _, default, _) in botocore.session.Session.SESSION_VARIABLES.items()
    }
    files = dict.fromkeys(("config_file", "credentials_file"), (None, None, None, None))
    core = botocore.session.Session(session_vars=variables | files)
    core.get_component("config_store").set_config_provider("s3", ConstantProvider({}))
    return boto3.session.Session(botocore_session=core)
