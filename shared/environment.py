"""What a child process of ours gets to know of our environment: how to run here, and no key of anybody's."""

import os
import re
from collections.abc import Mapping

NAMES = {"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SSL_CERT_FILE"}
BEGINNINGS = ("LC_", "XDG_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "HF_", "CUDA_", "NVIDIA_", "SIA_")
# A few vendors' own settings begin like their keys: NVIDIA_API_KEY, HF_TOKEN.
SECRET = re.compile(r"KEY|TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|_DSN$|_URL$")


def plain(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that say where and how programs run. Providers' keys are none of them, whatever they are called."""
    return {
        name: value
        for name, value in environ.items()
        if (name in NAMES or name.startswith(BEGINNINGS)) and not SECRET.search(name)
    }
