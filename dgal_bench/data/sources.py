"""What was published: files, sizes and digests, and how torchvision's classes say where the archives are.

Folders are torchvision's. Sizes and digests are of the unpacked files, in the order pool images, pool labels, test
images, test labels for the idx format.
"""

from collections.abc import Mapping
from typing import Any

from dgal_bench.data.archives import Address, Archive, gzipped, tarred, zipped_gz
from dgal_bench.data.files import File, Source


def from_mirrors(publisher: Any) -> dict[str, Address]:
    """MNIST's way: several mirrors of several archives."""
    return {
        name: Address(md5, tuple(f"{mirror}{name}" for mirror in publisher.mirrors))
        for name, md5 in publisher.resources
    }


def from_zip(publisher: Any) -> dict[str, Address]:
    """EMNIST's: one archive, called by the end of its address."""
    return {publisher.url.rsplit("/", 1)[-1]: Address(publisher.md5, (publisher.url,))}


def from_tgz(publisher: Any) -> dict[str, Address]:
    """CIFAR's: one archive."""
    return {publisher.filename: Address(publisher.tgz_md5, (publisher.url,))}


def from_splits(publisher: Any) -> dict[str, Address]:
    """SVHN's: a file for each split, not packed."""
    return {name: Address(md5, (url,)) for url, name, md5 in publisher.split_list.values()}


def each_gz(files: Mapping[str, File]) -> tuple[Archive, ...]:
    """Every file in a .gz of its own."""
    return tuple(Archive(f"{name}.gz", {name: name}, gzipped) for name in files)


def idx_files(prefixes: tuple[str, str], counts: tuple[int, int], *digests: str) -> dict[str, File]:
    """28x28 images and labels of pool and test split; an idx file is 4 bytes, 4 per dimension, and one per value.

    ``prefixes`` and ``counts``: of the two splits; ``digests``: of the four files, or none.
    """
    sizes: dict[str, int] = {}
    for prefix, count in zip(prefixes, counts, strict=True):
        sizes |= {f"{prefix}-images-idx3-ubyte": 16 + count * 28**2, f"{prefix}-labels-idx1-ubyte": 8 + count}
    known = digests or (None,) * len(sizes)
    return {name: File(size, digest) for (name, size), digest in zip(sizes.items(), known, strict=True)}


_MNIST_FILES = idx_files(
    ("train", "t10k"),
    (60_000, 10_000),
    "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
MNIST = Source("mnist", "MNIST/raw", "MNIST", _MNIST_FILES, each_gz(_MNIST_FILES), from_mirrors, (60_000, 10_000))

_FASHION_FILES = idx_files(
    ("train", "t10k"),
    (60_000, 10_000),
    "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
FASHION_MNIST = Source(
    "fashion_mnist",
    "FashionMNIST/raw",
    "FashionMNIST",
    _FASHION_FILES,
    each_gz(_FASHION_FILES),
    from_mirrors,
    (60_000, 10_000),
)

# Of its unpacked files no digest is published, only the archive's: that one is checked also where it lies by hand.
_EMNIST_FILES = idx_files(("emnist-letters-train", "emnist-letters-test"), (124_800, 20_800))
EMNIST = Source(
    "emnist",
    "EMNIST/raw",
    "EMNIST",
    _EMNIST_FILES,
    (Archive("gzip.zip", {f"gzip/{name}.gz": name for name in _EMNIST_FILES}, zipped_gz),),
    from_zip,
    (124_800, 20_800),
)

_SVHN_FILES = {
    "train_32x32.mat": File(182_040_794, "md5:e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test_32x32.mat": File(64_275_384, "md5:eb5a983be6a315427106f1b164d9cef3"),
}
SVHN = Source(
    "svhn",
    ".",
    "SVHN",
    _SVHN_FILES,
    tuple(Archive(name, {name: name}, unpack=None) for name in _SVHN_FILES),
    from_splits,
    (73_257, 26_032),
)

_CIFAR10_FILES = {
    "cifar-10-batches-py/data_batch_1": File(31_035_704, "md5:c99cafc152244af753f735de768cd75f"),
    "cifar-10-batches-py/data_batch_2": File(31_035_320, "md5:d4bba439e000b95fd0a9bffe97cbabec"),
    "cifar-10-batches-py/data_batch_3": File(31_035_999, "md5:54ebc095f3ab1f0389bbae665268c751"),
    "cifar-10-batches-py/data_batch_4": File(31_035_696, "md5:634d18415352ddfa80567beed471001a"),
    "cifar-10-batches-py/data_batch_5": File(31_035_623, "md5:482c414d41f54cd18b22e5b47cb7c3cb"),
    "cifar-10-batches-py/test_batch": File(31_035_526, "md5:40351d587109b95175f43aff81a1287e"),
    "cifar-10-batches-py/batches.meta": File(158, "md5:5ff9c542aee3614f3951f8cda6e48888"),
}
CIFAR10 = Source(
    "cifar10",
    ".",
    "CIFAR10",
    _CIFAR10_FILES,
    (Archive("cifar-10-python.tar.gz", {name: name for name in _CIFAR10_FILES}, tarred),),
    from_tgz,
    (50_000, 10_000),
)

_CIFAR100_FILES = {
    "cifar-100-python/train": File(digest="md5:16019d7e3df5f24257cddd939b257f8d"),
    "cifar-100-python/test": File(digest="md5:f0ef6b0ae62326f3e7ffdfab6717acfc"),
    "cifar-100-python/meta": File(digest="md5:7973b15100ade9c7d40fb424638fde48"),
}
CIFAR100 = Source(
    "cifar100",
    ".",
    "CIFAR100",
    _CIFAR100_FILES,
    (Archive("cifar-100-python.tar.gz", {name: name for name in _CIFAR100_FILES}, tarred),),
    from_tgz,
    (50_000, 10_000),
)
