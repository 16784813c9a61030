"""Download LibriSpeech or mini LibriSpeech from OpenSLR with Lhotse: download_librispeech.py DIR mini|full.

Prints one line and exits with code 1 if the network or an archive fails. A repetition continues where it stopped.
"""

from __future__ import annotations

import http.client
import logging
import os
import socket
import sys
import tarfile
import urllib.error
import zlib
from pathlib import Path

from lhotse.recipes.librispeech import LIBRISPEECH, MINI_LIBRISPEECH, download_librispeech

SERVER = os.environ.get("OPENSLR_RESOURCES", "https://www.openslr.org/resources")
SECONDS_WITHOUT_DATA = 60.0
REPEAT = "repeat the command to continue, or give the folder of an unpacked copy with --corpus"


def download(folder: Path, part: str) -> str | None:
    """Download and unpack one part, unless it is there; returns what went wrong."""
    archive = folder / f"{part}.tar.gz"
    url = f"{SERVER}/{31 if part in MINI_LIBRISPEECH else 12}/{archive.name}"
    try:
        download_librispeech(folder, part, base_url=SERVER)
    except EOFError:
        return f"{archive}: the download is not complete; {REPEAT}"
    except (tarfile.TarError, zlib.error):
        archive.unlink()  # otherwise the next call would continue a damaged file
        return f"{archive}: the archive is damaged and was deleted; {REPEAT}"
    except urllib.error.HTTPError as error:
        return f"cannot download {url}: {error.code} {error.reason}; {REPEAT}"
    except urllib.error.URLError as error:
        return f"cannot download {url}: {error.reason}; {REPEAT}"
    except OSError as error:
        if error.filename is not None:  # a file that cannot be written
            return f"{error.filename}: {error.strerror}"
        return f"cannot download {url}: {error}; {REPEAT}"
    except http.client.HTTPException as error:
        return f"cannot download {url}: {error}; {REPEAT}"
    return None


def main() -> None:
    logging.disable(logging.WARNING)
    socket.setdefaulttimeout(SECONDS_WITHOUT_DATA)
    folder, size = Path(sys.argv[1]), sys.argv[2]
    for part in MINI_LIBRISPEECH if size == "mini" else LIBRISPEECH:
        if problem := download(folder, part):
            sys.exit(f"error: {problem}")


if __name__ == "__main__":
    main()
