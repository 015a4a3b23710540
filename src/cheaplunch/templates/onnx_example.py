"""An image and clicks, or a box → a mask, with NumPy, Pillow and onnxruntime: no torch.

python example.py IMAGE.png MASK.png X,Y,1 [X,Y,0 ...]     points: 1 on the target, 0 off it
python example.py IMAGE.png MASK.png X0,Y0,X1,Y1           a box: its first and its last pixel
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

here = Path(__file__).parent
encoder = onnxruntime.InferenceSession(here / "encoder.onnx", providers=["CPUExecutionProvider"])
decoder = onnxruntime.InferenceSession(here / "decoder.onnx", providers=["CPUExecutionProvider"])
about = {name: json.loads(value) for name, value in encoder.get_modelmeta().custom_metadata_map.items()}
side = about["image_size_px"]


def prepare(image):
    """(H, W, 3) in [0, 1] → (1, 3, side, side), and the (h, w) that it takes of it."""
    scale = side / max(image.shape[:2])
    h, w = (max(1, int(length * scale + 0.5)) for length in image.shape[:2])
    square = np.empty((3, side, side), np.float32)
    square[:] = np.array(about["padding"], np.float32)[:, None, None]
    for channel, plane in zip(square, np.moveaxis(image, 2, 0), strict=True):
        resized = Image.fromarray(np.ascontiguousarray(plane)).resize((w, h), Image.Resampling.BILINEAR)
        channel[:h, :w] = np.asarray(resized)
    return square[None], (h, w)


def prompt(words, scale):
    """Words of the command line → points (1, 1, K, 2) in px of the square, and labels (1, 1, K)."""
    numbers = [[float(n) for n in word.split(",")] for word in words]
    if len(numbers[0]) == 4:
        x0, y0, x1, y1 = numbers[0]
        grown = (np.maximum(scale, 1) - 1) / 2  # an enlarged pixel is several: to the outermost of them
        points = (np.array([[x0, y0], [x1, y1]]) + 0.5) * scale - 0.5 + [-grown, grown]
        labels = [2, 3]
    else:
        points = (np.array([[x, y] for x, y, _ in numbers]) + 0.5) * scale - 0.5
        points = np.vstack([points, [[0, 0]]])  # without a box: one that is none
        labels = [int(label) for _, _, label in numbers] + [-1]
    return points[None, None].astype(np.float32), np.array(labels)[None, None]


def stretch(logits, length, share):
    """The rows that show the image, `share` of all → `length` rows, bilinear."""
    count = len(logits)
    at = (np.arange(length) + 0.5) / length * share * count - 0.5
    at = at.clip(0, max(share * count - 1, 0))[:, None]
    low = np.floor(at).astype(int).clip(0, count - 2)
    below, above = logits[low[:, 0]], logits[low[:, 0] + 1]
    return below + (above - below) * (at - low)


source, target, *words = sys.argv[1:]
image = np.asarray(Image.open(source).convert("RGB"), np.float32) / 255
height, width = image.shape[:2]
square, (h, w) = prepare(image)
[embedding] = encoder.run(None, {"image": square})
points, labels = prompt(words, np.array([w / width, h / height]))
mask_side = decoder.get_inputs()[3].shape[-1]
inputs = {"embedding": embedding, "points": points, "labels": labels}
inputs |= {"mask": np.zeros((1, 1, mask_side, mask_side), np.float32), "has_mask": np.zeros(1, np.float32)}
[answer] = decoder.run(None, inputs)
logits = np.asarray(answer)[0, 0]
logits = stretch(stretch(logits, height, h / side).T, width, w / side).T
Image.fromarray(np.uint8(255) * (logits > 0).astype(np.uint8)).save(target)
