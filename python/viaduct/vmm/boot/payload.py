"""The ELF kernel inside a bzImage, unpacked here: for the ways of booting that need it.

boot.rst, "payload_offset". What Python does not unpack itself, that format's own tool does if it is installed. The
kernel is unpacked by pieces into memory outside the interpreter, and no further than the guest has RAM.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from viaduct.vmm.boot import elf
from viaduct.vmm.boot.bzimage import read_setup_header
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.image import PIECE, Image

PACKED_MAX = 256 << 20
LIBRARY: dict[bytes, Callable[[BinaryIO], object]] = {
    b"\x1f\x8b": lambda packed: gzip.GzipFile(fileobj=packed),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
    elf.MAGIC: lambda packed: packed,
}
TOOLS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4", b"\x89LZO": "lzop"}
SIZE_BYTES = 4
"""Linux's build appends the unpacked size to what is packed, but not to gzip, which has it itself."""


def unpack(image: Image, limit: int) -> Image:
    """The kernel inside a bzImage, of at most `limit` bytes, as a file of its own. Raises BootError if it fails."""
    header = read_setup_header(image)
    if header.payload_length > PACKED_MAX:
        raise image.error(f"has a payload of {header.payload_length} bytes", f"allowed are {PACKED_MAX}")
    packed = image.read(header.kernel_offset + header.payload_offset, header.payload_length, "the packed kernel")
    if not packed.startswith((b"\x1f\x8b", elf.MAGIC)):
        packed = packed[:-SIZE_BYTES]
    library = next((opener for magic, opener in LIBRARY.items() if packed.startswith(magic)), None)
    tool = next((name for magic, name in TOOLS.items() if packed.startswith(magic)), None)
    if library is not None:
        stream = cast(BinaryIO, library(io.BytesIO(packed)))
        return Image.of(image.name, _pieces(image, stream, limit))
    if tool is None:
        raise image.error(f"has a payload of unknown packing ({packed[:6].hex(' ')})", "take --boot bzimage")
    if shutil.which(tool) is None:
        raise image.error(f"is packed with {tool}, which is not here", f"install {tool}, or take --boot bzimage")
    with tempfile.TemporaryFile() as source:
        source.write(packed)
        source.seek(0)
        with subprocess.Popen(
            [tool, "-dc"], stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            try:
                return Image.of(image.name, _pieces(image, cast(BinaryIO, process.stdout), limit))
            finally:
                process.kill()


def _pieces(image: Image, stream: BinaryIO, limit: int) -> Iterator[bytes]:
    left = limit
    try:
        while piece := stream.read(PIECE):
            left -= len(piece)
            if left < 0:
                raise image.error(f"unpacks to more than the {limit} bytes of RAM", "give more memory (--memory)")
            yield piece
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise image.error(f"its packed kernel is damaged ({error})", "copy or download it again") from None
    if left == limit:
        raise BootError(image.name, "its packed kernel is empty", "copy or download it again")
