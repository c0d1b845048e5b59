"""nvfp4 as files have it: codes, and the order of their block scales (engine-spec 2.8). Needs numpy."""
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of the codes 0 to 7; bit 3 is the sign


def code_values(data):
    """u8 [rows, columns / 2], the first of two codes in the high half -> their values [rows, columns], without any scale."""
    codes = np.stack([data >> 4, data & 15], -1).reshape(data.shape[0], -1)
    return np.where(codes & 8, -E2M1[codes & 7], E2M1[codes & 7])


def swizzled(scales):
    """[rows, columns], padded to 128 x 4, in tiles of 128 x 4 whose rows stand 32 apart."""
    rows, columns = scales.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-columns // 4) * 4), scales.dtype)
    padded[:rows, :columns] = scales
    tiles = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles.reshape(-1, 4, 32, 4).transpose(0, 2, 1, 3)).reshape(padded.shape)


def unswizzled(file, rows, columns):
    """The scales of so many rows and columns out of a file's."""
    place = swizzled(np.arange(file.size).reshape(file.shape))
    scales = np.empty(file.size, file.dtype)
    scales[place.ravel()] = file.ravel()
    return scales.reshape(file.shape)[:rows, :columns]
