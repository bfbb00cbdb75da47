"""The demo sets: three made-up products under an inspection camera, drawn here, so that nothing has to be fetched.

`gear` (an object, turned and shifted a little), `fabric` (a texture) and `circuit` (an aligned part). A picture is a
surface of height, colour and gloss, lit by one lamp and a ring light at twice the final size, reduced, and given sensor
noise. A defective picture is the same scene drawn twice, without and with its defect: the mask is exactly where the
defect was let change the picture. Contrast and play are moderate, so that even an untrained CNN sees most defects.
"""

import json
import math
import os
import re
import shutil
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

VERSION = 1  # raise it when any pixel changes: sets of an older version are then drawn again
SEED = 11
SIZE, SCALE = 256, 2  # final pixels a side; drawn SCALE times as large
N = SIZE * SCALE
STAMP = "demo.json"
VISIBLE = 5 / 255  # a smaller change, about that of the sensor noise, is no part of a defect
DEFECTS = {
    "gear": ("broken_tooth", "rust", "scratch", "swarf"),
    "fabric": ("fibre", "hole", "missing_thread", "stain"),
    "circuit": ("cut_trace", "missing_part", "skewed_part", "solder_bridge"),
}


# ---- what every scene is made of ----


def _step(t):
    """Smooth step from 0 at t <= 0 to 1 at t >= 1."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def _mix(base, layer, alpha):
    """In place: `layer` over `base` (H, W, ...) with opacity `alpha` (H, W)."""
    alpha = alpha[..., None] if base.ndim == 3 else alpha
    base += alpha * (np.asarray(layer, np.float32) - base)


def _noise(rng, cell):
    """Smooth noise of unit variance whose features are about `cell` final pixels wide, float32 (N, N)."""
    n = max(4, round(SIZE / cell))
    grid = Image.fromarray(rng.standard_normal((n, n)).astype(np.float32))
    field = np.asarray(grid.resize((N, N), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def _box(x, y, half_w, half_h, radius=0.0):
    """Signed distance to a rectangle with rounded corners, negative inside."""
    qx, qy = np.abs(x) - half_w + radius, np.abs(y) - half_h + radius
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - radius


def _stroke(points, width, soft=0.0):
    """Coverage in [0, 1], float32 (N, N), of a line through points (n, 2) in final pixels from the centre."""
    image = Image.new("L", (2 * N, 2 * N))
    xy = (np.asarray(points) + SIZE / 2) * 2 * SCALE
    ImageDraw.Draw(image).line([tuple(p) for p in xy], fill=255, width=max(1, round(width * 2 * SCALE)), joint="curve")
    cover = np.asarray(image.reduce(2), np.float32) / 255
    return ndimage.gaussian_filter(cover, soft * SCALE) if soft else cover


class _Surface:
    """Height (in final pixels), colour and gloss of a scene, with coordinates x, y in final pixels."""

    def __init__(self, colour, pose=(0.0, 0.0, 0.0)):
        axis = (np.arange(N, dtype=np.float32) + 0.5) / SCALE - SIZE / 2
        self.height, self.gloss = np.zeros((2, N, N), np.float32)
        self.colour = np.tile(np.float32(colour), (N, N, 1))
        self.x, self.y = np.meshgrid(axis, axis)
        self.pose = pose  # where parts placed by `at` really lie: shift x, shift y, angle in radians

    def at(self, cx, cy, reach=SIZE, angle=0.0):
        """A view on the square of half width `reach` about (cx, cy), with coordinates of its own, turned by `angle`."""
        dx, dy, turn = self.pose
        c, s = math.cos(turn), math.sin(turn)
        px, py = float(dx + cx * c - cy * s), float(dy + cx * s + cy * c)
        rows, cols = (slice(*(max(0, int((p + SIZE / 2 + r) * SCALE)) for r in (-reach, reach))) for p in (py, px))
        part = object.__new__(_Surface)
        part.height, part.gloss, part.colour = self.height[rows, cols], self.gloss[rows, cols], self.colour[rows, cols]
        x, y, c, s = self.x[rows, cols] - px, self.y[rows, cols] - py, math.cos(turn + angle), math.sin(turn + angle)
        part.x, part.y, part.pose = c * x + s * y, c * y - s * x, self.pose
        return part

    def add(self, distance, colour, rise=0.0, gloss=0.0, bevel=1.0):
        """Lay a part, given by its signed distance, on top: its rim rises over `bevel` pixels."""
        cover = np.clip(0.5 - distance * SCALE, 0, 1)
        _mix(self.colour, colour, cover)
        _mix(self.gloss, gloss, cover)
        self.height += rise * _step(-distance / bevel)

    def lit(self, rng):
        """The scene under a lamp that varies a little: float32 (SIZE, SIZE, 3), about 0 to 1."""
        azimuth, exposure = math.radians(-125 + rng.uniform(-2, 2)), rng.uniform(0.99, 1.01)
        lx, ly, lz = 0.55 * math.cos(azimuth), 0.55 * math.sin(azimuth), 0.835
        gy, gx = np.gradient(self.height, np.float32(1 / SCALE))
        norm = np.sqrt(gx * gx + gy * gy + 1)
        diffuse = np.clip((lz - gx * lx - gy * ly) / norm, 0, None)
        hz = math.sqrt((1 + lz) / 2)  # half vector between the lamp and the camera straight above
        shine = np.clip((hz - (gx * lx + gy * ly) / (2 * hz)) / norm, 0, None) ** 24
        around = ndimage.uniform_filter(ndimage.uniform_filter(self.height, 9 * SCALE), 7 * SCALE)
        shift = (round(-2.5 * SCALE * math.sin(azimuth)), round(-2.5 * SCALE * math.cos(azimuth)))
        shade = 1 / (1 + 0.12 * np.clip(np.roll(around, shift, (0, 1)) - self.height, 0, None))
        falloff = 1.04 - 0.14 * ((self.x + 25) ** 2 + (self.y + 30) ** 2) / SIZE**2 * 2
        light = (0.42 + 0.72 * diffuse) * shade * falloff * exposure
        picture = self.colour * light[..., None] + (self.gloss * shine * shade * exposure)[..., None]
        small = sum(picture[i::SCALE, j::SCALE] for i in range(SCALE) for j in range(SCALE)) / SCALE**2
        return ndimage.gaussian_filter(small, (0.45, 0.45, 0), truncate=3)  # the lens


# ---- the three products; `rng` draws the scene, `flaw` only the defect ----


def _blob(surface, cx, cy, radius, flaw, rough=0.45):
    """Irregular patch about (cx, cy): > 0 inside, 1 at its centre."""
    rough_edge = rough * _noise(flaw, 9) + 0.35 * rough * _noise(flaw, 4)
    return 1 - np.hypot(surface.x - cx, surface.y - cy) / radius + rough_edge


def _curl(flaw, length, bend):
    """A smooth wandering curve of about `length` pixels about the origin, (60, 2)."""
    t = np.linspace(-1, 1, 60)
    heading = flaw.uniform(0, 2 * np.pi) + bend * (flaw.uniform(0.6, 1) * t + flaw.uniform(-0.5, 0.5) * np.sin(3 * t))
    path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0) * length / 60
    return path - path.mean(0)


def _gear(rng, flaw, kind, severity):
    """A turned steel gear on a grey tray."""
    pose = (*rng.uniform(-1.2, 1.2, 2), math.radians(rng.uniform(-1.8, 1.8)))
    tray = _Surface((0.40, 0.41, 0.43), pose)
    _mix(tray.colour, (0.46, 0.47, 0.49), 0.3 + 0.12 * _noise(rng, 3))
    s = tray.at(0, 0)
    r, theta = np.hypot(s.x, s.y), np.arctan2(s.y, s.x)
    teeth = 16
    wave = np.abs((theta * teeth / (2 * np.pi)) % 1 - 0.5) * 2
    tip = 83 + 17 * _step((0.78 - wave) / 0.5)
    if kind == "broken_tooth":
        tooth, width = (flaw.integers(teeth) + 0.5) * 2 * math.pi / teeth, (1.2 + 0.6 * severity) * math.pi / teeth
        off = (theta - tooth + math.pi) % (2 * math.pi) - math.pi
        fracture = 93 - 15 * severity + 22 * off * flaw.choice([-1, 1]) + 1.2 * _noise(flaw, 4)
        tip = np.where(np.abs(off) < width, np.minimum(tip, np.maximum(fracture, 74)), tip).astype(np.float32)
    fold = ((theta * 5 / (2 * np.pi)) % 1 - 0.5) * 2 * np.pi / 5
    holes = np.hypot(r * np.cos(fold) - 53, r * np.sin(fold)) - 11.5
    bore = np.minimum(r - 17, _box(s.x - 17, s.y, 6, 4.5, 0.5))
    body = np.maximum((r - tip) * 0.75, -np.minimum(holes, bore))
    s.add(body, (0.6, 0.61, 0.63), rise=6, gloss=0.15, bevel=2.2)
    steel = _step(-body)
    s.height -= 2 * _step((r - 31) / 2.5) * _step((75 - r) / 2.5) * steel  # the web between hub and rim is thinner
    marks = ndimage.gaussian_filter1d(rng.standard_normal(600), 1.6)
    rings = np.interp(r, np.linspace(0, 120, 600), marks).astype(np.float32)  # left by the lathe
    beam = np.cos(theta + pose[2] + 2.1 + 0.08 * rings) ** 2  # turned faces shine in two opposite sectors
    s.colour *= (1 + steel * (0.34 * beam**3 - 0.12 + 0.03 * rings))[..., None]
    s.colour *= (1 + 0.012 * steel * _noise(rng, 14))[..., None]
    if kind == "rust":
        a, d = flaw.uniform(0, 2 * np.pi), flaw.choice([24, 75]) + flaw.uniform(-2, 2)
        spot = _blob(s, d * np.cos(a), d * np.sin(a), 8 + 9 * severity, flaw)
        stain = _step(spot * 3) * steel * (0.5 + 0.45 * severity)
        _mix(s.colour, np.float32((0.36, 0.15, 0.05)) * (1 + 0.25 * _noise(flaw, 2))[..., None], stain)
        _mix(s.gloss, 0, stain)
        s.height += 0.25 * stain * _noise(flaw, 2)
    elif kind == "scratch":
        a, d = flaw.uniform(0, 2 * np.pi), flaw.uniform(25, 80)
        path = _curl(flaw, 34 + 50 * severity, 0.3) + d * np.array([np.cos(a), np.sin(a)]) + pose[:2]
        groove = _stroke(path, 1.6 + 1.5 * severity, 0.4) * steel
        s.height -= (0.8 + 2 * severity) * groove
        _mix(s.colour, (0.22, 0.21, 0.21), (0.6 + 0.35 * severity) * groove)
    elif kind == "swarf":
        a, d = flaw.uniform(0, 2 * np.pi), flaw.uniform(30, 75)
        t, turn = np.linspace(-1, 1, 120), flaw.uniform(0, 2 * math.pi)
        phase, loop = (8 + 14 * severity) * t, (4 + 3 * severity) * (1 + 0.35 * t)  # a helix, seen from the side
        bow = flaw.uniform(2, 7) * t * t
        helix = np.stack([phase * (1.1 + 0.25 * t) + 0.6 * loop * np.sin(phase), bow + loop * np.cos(phase)], 1)
        spin = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        path = helix @ spin + d * np.array([math.cos(a), math.sin(a)]) + pose[:2]
        tube = _stroke(path, 1.5 + 0.8 * severity, 0.4)
        _mix(s.colour, (0.86, 0.72, 0.44), np.clip(1.6 * tube, 0, 1))
        _mix(s.gloss, 0.9, tube)
        s.height += 2.5 * tube + (7 - s.height) * np.clip(2 * tube, 0, 1)
    return tray.lit(rng)


def _fabric(rng, flaw, kind, severity):
    """A 2/2 twill of dark warp and light weft."""
    s = _Surface((0.5, 0.5, 0.5), (0, 0, math.radians(rng.normal(0, 0.5)))).at(0, 0)
    pitch = 6.4
    u = s.x / pitch + rng.uniform(40, 44) + 0.13 * _noise(rng, 45)
    v = s.y / pitch + rng.uniform(40, 44) + 0.13 * _noise(rng, 45)
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    if kind == "hole":  # every thread tears at a place of its own
        cx, cy = flaw.uniform(-70, 70, 2)
        ragged = 0.3 * flaw.standard_normal(128)
        tear = _blob(s, cx, cy, 6 + 8 * severity, flaw, 0.25)
    thick_u, thick_v = 1 + 0.04 * rng.standard_normal((2, 128)).astype(np.float32)
    layers = []
    for across, along, thread, thick, tone, centre in (
        (u, v, i, thick_u, (0.25, 0.32, 0.45), 1),  # warp
        (v, u, j, thick_v, (0.56, 0.57, 0.57), 2),  # weft
    ):
        f = 2 * (across - thread) - 1
        yarn = np.sqrt(np.clip(1 - (f / (0.97 * thick[thread])) ** 2, 0, 1))
        over = np.cos(np.pi / 2 * (along - thread - centre))
        twist = np.cos(2 * np.pi * (along * 2.2 + f * 0.55))
        height = 1.5 * yarn + 1.1 * over + 0.1 * twist - 1.5 * (yarn == 0)
        shade = (0.93 + 0.05 * twist + 0.6 * (thick[thread] - 1)) * (0.55 + 0.45 * yarn)
        if kind == "missing_thread" and centre == 2:
            start, row = flaw.uniform(-95, 5), round(flaw.uniform(-75, 75) / pitch) + 42
            end, last = start + 55 + 40 * severity, row + (severity > 0.4)
            height = np.where((thread >= row) & (thread <= last) & (s.x > start) & (s.x < end), -4, height)
        if kind == "hole":
            height = np.where(tear > ragged[thread], -4, height)
        layers.append((height, np.float32(tone) * shade[..., None].astype(np.float32)))
    (warp, warp_colour), (weft, weft_colour) = layers
    top = np.maximum(warp, weft)
    s.height += np.maximum(top, -2.0) * 0.8
    s.colour[:] = warp_colour
    _mix(s.colour, weft_colour, _step((weft - warp) * 4 + 0.5))
    _mix(s.colour, (0.07, 0.07, 0.08), _step((-0.9 - top) / 0.5))  # the dark bench shows between the threads
    s.gloss += 0.05
    s.colour *= (1 + 0.02 * _noise(rng, 40))[..., None]
    if kind == "stain":
        spot = _blob(s, *flaw.uniform(-70, 70, 2), 11 + 11 * severity, flaw, 0.3)
        wet = _step(spot * 2.5)
        s.colour *= 1 - (0.28 + 0.17 * severity) * wet[..., None] * np.float32((0.8, 1, 1.2))
    elif kind == "fibre":
        path = _curl(flaw, 40 + 50 * severity, 2.2) + flaw.uniform(-65, 65, 2)
        lint = _stroke(path, 1.2 + 1.4 * severity, 0.35)
        _mix(s.colour, (0.75, 0.15, 0.1), np.clip(1.4 * lint, 0, 1))
        s.height += (3.2 - s.height) * np.clip(1.5 * lint, 0, 1)
    return s.lit(rng)


GREEN, TRACE, GOLD = (0.1, 0.36, 0.23), (0.14, 0.45, 0.28), (0.68, 0.58, 0.32)
TIN, WHITE, BLACK = (0.54, 0.55, 0.56), (0.72, 0.77, 0.73), (0.15, 0.155, 0.16)
LEGS = [(-20 + side * 30, -18 + (k - 3) * 11) for side in (-1, 1) for k in range(7)]
PINS = [(x, 90.0) for x in range(-63, 64, 18)]
TRACES = [
    [(-54, -51), (-62, -51), (-80, -69), (-80, -78)],
    [(-54, -40), (-66, -40), (-78, -46)],
    [(-54, -29), (-66, -29), (-78, -17)],
    [(-54, -18), (-60, -18), (-66, -12), (-66, 8), (-86, 20)],
    [(-54, -7), (-60, -1), (-60, 56), (-45, 71), (-45, 84)],
    [(-54, 4), (-54, 40), (-27, 67), (-27, 84)],
    [(-86, 40), (-86, 52), (-63, 75), (-63, 84)],
    [(14, -51), (22, -51), (34, -63), (44, -63)],
    [(14, -40), (28, -40), (40, -28), (100, -28), (106, -34), (106, -90)],
    [(14, -29), (24, -29), (36, -17), (46, -17)],
    [(14, -18), (20, -18), (32, -6), (32, 14), (44, 26)],
    [(14, -7), (22, 1), (22, 50), (27, 55), (27, 84)],
    [(14, 4), (14, 60), (9, 65), (9, 84)],
    [(-4, 46), (-4, 60), (-9, 65), (-9, 84)],
    [(45, 54), (45, 84)],
    [(84, 48), (84, 60), (63, 72), (63, 84)],
    [(60, 0), (84, 16), (84, 22)],
]
PARTS = [  # x, y, degrees, capacitor?
    *((-80, -88, 0, True), (-30, -88, 0, False), (10, -88, 0, False), (-86, 28, 90, False)),
    *((-18, 44, 0, True), (45, 40, 90, False), (84, 36, 90, True)),
]
# Places where a trace lies in the open.
CUTS = [(-60, 25), (-54, 28), (-38, 56), (22, 28), (14, 35), (32, 4), (70, -28), (-72, -61), (-75, 63)]
VIAS = [(106, -90), (60, 0), (-66, 8)]


@cache
def _artwork():
    """Traces, and the white print, of the board in its own frame: two greyscale pictures of 2 N pixels a side."""
    scale = 2 * SCALE
    copper, silk = Image.new("L", (2 * N, 2 * N)), Image.new("L", (2 * N, 2 * N))
    pen, print_pen = ImageDraw.Draw(copper), ImageDraw.Draw(silk)
    for line in TRACES:
        xy = [((x + SIZE / 2) * scale, (y + SIZE / 2) * scale) for x, y in line]
        pen.line(xy, fill=255, width=round(2.6 * scale), joint="curve")
    for x, y, degrees, _ in PARTS:
        w, h = (19, 10) if degrees == 0 else (10, 19)
        corners = [(p + SIZE / 2) * scale for p in (x - w, y - h, x + w, y + h)]
        print_pen.rectangle(corners, outline=255, width=3)
    font = ImageFont.load_default_imagefont()  # the built-in bitmap font: the same letters everywhere
    for text, x, y in (("U1", -36, 25), ("Y1", -98, 0), ("J2", -100, 68), ("Q3", 72, -16), ("RCP-02", 48, -107)):
        box = Image.new("L", (6 * len(text), 11))
        ImageDraw.Draw(box).text((0, 0), text, fill=255, font=font)
        box = box.resize((round(box.width * 0.75 * scale), round(8.25 * scale)), Image.Resampling.BICUBIC)
        silk.paste(box, tuple(round((p + SIZE / 2) * scale) for p in (x, y)))
    return copper, silk


def _warp(art, pose):
    """`_artwork` laid at the board's pose: coverage float32 (N, N)."""
    dx, dy, turn = pose
    c, s, half = np.cos(turn), np.sin(turn), N / 2
    dx, dy = half + dx * SCALE, half + dy * SCALE
    affine = (2 * c, 2 * s, N - 2 * (c * dx + s * dy), -2 * s, 2 * c, N - 2 * (c * dy - s * dx))
    return np.asarray(art.transform((N, N), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC), np.float32) / 255


def _circuit(rng, flaw, kind, severity):
    """A circuit board with its parts, always in the same pose but for the play of its fixture."""
    pose = (*rng.uniform(-0.4, 0.4, 2), math.radians(rng.uniform(-0.12, 0.12)))
    s = _Surface(GREEN, pose)
    s.gloss += 0.1
    copper, silk = (_warp(art, pose) for art in _artwork())
    s.colour *= (1 + 0.025 * _noise(rng, 30) + 0.015 * _noise(rng, 2))[..., None]
    _mix(s.colour, TRACE, copper)
    s.height += 0.5 * copper
    if kind == "cut_trace":  # a tool slipped: through the lacquer, across a copper trace
        x, y = CUTS[flaw.integers(len(CUTS))]
        path = _curl(flaw, 24 + 30 * severity, 0.2) + np.array([x, y])
        gouge = _stroke(path, 2 + 3.4 * severity, 0.3)
        _mix(s.colour, (0.86, 0.77, 0.52), gouge)
        _mix(s.colour, (0.85, 0.5, 0.3), gouge * copper * 0.8)
        s.height -= 0.9 * gouge
    _mix(s.colour, WHITE, 0.6 * silk)
    for x, y in VIAS:
        via = s.at(x, y, 6)
        via.add(np.hypot(via.x, via.y) - 3, GOLD, rise=0.3, gloss=0.3)
        via.add(np.hypot(via.x, via.y) - 1.3, (0.04, 0.05, 0.04), rise=-1)

    victim = flaw.integers(len(PARTS))
    for n, (x, y, degrees, capacitor) in enumerate(PARTS):
        jitter, turn, solder = rng.uniform(-0.4, 0.4, 2), rng.uniform(-1, 1), rng.uniform(-0.4, 0.4, 2)
        pads = s.at(x, y, 22, math.radians(degrees))
        for side, more in zip((-1, 1), solder, strict=True):
            pads.add(_box(pads.x - side * 11, pads.y, 5, 6.8, 1), TIN, rise=1.3, gloss=0.3, bevel=3 + more)
        if n == victim and kind == "missing_part":
            continue
        if n == victim and kind == "skewed_part":
            jitter = jitter + flaw.uniform(2, 4, 2) * flaw.choice([-1, 1], 2) * (0.65 + 0.95 * severity)
            turn += flaw.choice([-1, 1]) * (13 + 29 * severity)
        part = s.at(x + jitter[0], y + jitter[1], 22, math.radians(degrees + turn))
        part.add(_box(part.x, part.y, 12, 6.3, 0.8), TIN, rise=3, gloss=0.3, bevel=1.6)
        middle = _box(part.x, part.y, 8.2, 6.3)
        part.add(middle, (0.42, 0.28, 0.17) if capacitor else (0.14, 0.14, 0.15), rise=0.3, gloss=0.12, bevel=0.8)
        if not capacitor:  # its printed value
            bars = np.maximum(np.abs(part.y) - 2.6, 0.7 - np.abs(np.abs(part.x) % 3.6 - 1.8))
            part.add(np.maximum(bars, np.abs(part.x) - 5.4), (0.45, 0.46, 0.46))

    for x, y in LEGS:
        leg, side = s.at(x, y + rng.normal(0, 0.15), 14), np.sign(x + 20)
        leg.add(_box(leg.x - 2 * side, leg.y, 7, 3.2, 0.8), TIN, rise=0.9 + 0.1 * rng.normal(), gloss=0.3, bevel=2)
        leg.add(_box(leg.x, leg.y, 8, 2, 0.4), (0.58, 0.59, 0.6), rise=1.4, gloss=0.3, bevel=1)
    if kind == "solder_bridge":
        x, y = LEGS[flaw.choice([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12])]
        drop = s.at(x + np.sign(x + 20) * flaw.uniform(1, 5), y + 5.5, 16)
        blob = _box(drop.x, drop.y, 2 + 4 * severity, 6, 1) - (0.4 + 1.8 * severity) * np.cos(drop.y / 4) ** 2
        drop.add(blob, (0.78, 0.79, 0.8), rise=3, gloss=0.7, bevel=3)
    chip = s.at(-20, -18, 56, math.radians(rng.normal(0, 0.3)))
    chip.add(_box(chip.x, chip.y, 25, 42, 0.8), BLACK, rise=6, gloss=0.1, bevel=2)
    chip.add(np.hypot(chip.x + 17, chip.y + 34) - 3, (0.06, 0.06, 0.065), rise=-0.8)
    for row, width in ((-9, 15), (-1, 11), (7, 13)):  # laser marks, too small to read
        glyphs = np.maximum(np.abs(chip.y - row) - 2, np.abs(chip.x) - width)
        gaps = 0.9 - np.abs(chip.x % 4 - 2 + 0.8 * np.sin(chip.y * 2 + chip.x))
        chip.add(np.maximum(glyphs, gaps), (0.34, 0.34, 0.34))

    can = s.at(70, -62, 34, rng.normal(0, 0.01))
    r = np.hypot(can.x, can.y)
    can.add(_box(can.x, can.y, 27, 27, 5), BLACK, rise=2, gloss=0.1)
    can.add(r - 25, (0.5, 0.51, 0.53), rise=6, gloss=0.2, bevel=3.5)
    can.add(np.maximum(r - 21, can.x + 11), (0.2, 0.2, 0.22))
    crystal = s.at(-88, -32, 34)
    crystal.add(_box(crystal.x, crystal.y, 10, 25, 10), (0.5, 0.5, 0.5), rise=1, gloss=0.4)
    crystal.add(_box(crystal.x, crystal.y, 8, 23, 8), (0.54, 0.54, 0.55), rise=4, gloss=0.2, bevel=2)
    three = s.at(58, -6, 18)  # a transistor
    for x, y in ((-6, -8), (6, -8), (0, 8)):
        three.add(_box(three.x - x, three.y - y, 2.4, 3.4, 0.6), TIN, rise=1.4, gloss=0.6, bevel=1.6)
    three.add(_box(three.x, three.y, 10, 5.6, 0.6), BLACK, rise=4, gloss=0.1, bevel=1.6)
    header = s.at(0, 90, 84)
    header.add(_box(header.x, header.y, 76, 13, 1), BLACK, rise=6, gloss=0.12, bevel=1.4)
    for x, y in PINS:
        pin = s.at(x, y, 10, rng.normal(0, 0.02))
        pin.add(_box(pin.x, pin.y, 6, 6, 0.5), (0.05, 0.05, 0.05), rise=-2, bevel=1)
        pin.add(_box(pin.x, pin.y, 3.2, 3.2, 0.5), GOLD, rise=4, gloss=0.4, bevel=1.6)
    return s.lit(rng)


# ---- pictures and files ----

_SCENES = {"gear": _gear, "fabric": _fabric, "circuit": _circuit}


def _picture(category, split, kind, index):
    """One picture, uint8 (SIZE, SIZE, 3); the same without its defect; and the mask, bool (SIZE, SIZE).

    Seeded by its own name alone, so that neither the order of drawing nor the size of the set changes a picture.
    """
    seed = [SEED, zlib.crc32(f"{category}/{split}/{kind}".encode()), index]

    def scene(kind):
        rng, flaw = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
        return _SCENES[category](rng, flaw, kind, severity=(0.25, 0.5, 0.75, 1.0)[index % 4])

    grain = np.random.default_rng([*seed, 2]).standard_normal((SIZE, SIZE, 4), np.float32)
    grain = grain[..., :1] + 0.4 * grain[..., 1:]  # sensor noise, mostly the same in the three channels

    def camera(light):
        noisy = light + grain * np.sqrt(2e-5 + 5e-5 * np.clip(light, 0, 1))
        return np.clip(noisy * 255 + 0.5, 0, 255).astype(np.uint8)

    clean = scene("good")
    if kind == "good":
        return camera(clean), camera(clean), np.zeros((SIZE, SIZE), bool)
    flawed = scene(kind)
    changed = ndimage.binary_fill_holes(np.abs(flawed - clean).max(2) > VISIBLE)
    parts, count = ndimage.label(changed, np.ones((3, 3)))
    area = ndimage.sum_labels(changed, parts, np.arange(count + 1))
    mask = (area >= 6)[parts] & changed  # without lone specks at the edge of visibility
    return camera(np.where(mask[..., None], flawed, clean)), camera(clean), mask


def _complete(root, wanted):
    """Whether `root` holds the set that the stamp `wanted` describes, every file of the size that was written."""
    try:
        stamp = json.loads((root / STAMP).read_text())
        files = stamp.pop("files")
        return stamp == wanted and all((root / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, AttributeError, KeyError):  # no stamp, a damaged one, or a file is gone
        return False


def _refuse_foreign(root, ours, what):
    """ValueError where redrawing would delete a file that is not the demo set's."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{what}: root {root} is a file; expected a folder, or a name for a new one")
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not re.fullmatch(rf"{ours}|{re.escape(STAMP)}", name):
            raise ValueError(f"{what}: root {root} holds {name}, not of the demo set; expected an empty or new folder")


def _draw_set(what, root, counts, ours, jobs, pictures_of):
    """Draw a set unless `root` already holds it whole; returns `root` as a Path.

    `ours` is the pattern of its file names; `pictures_of(job)` yields (name, uint8 array or text) of one of the `jobs`. All is
    drawn beside `root` and renamed, the stamp last: a killed or a second process leaves no half set; an incomplete or older
    one is drawn again. ValueError for a count below 1, and where drawing again would delete files that are not the set's.
    """
    given, root = Path(root), Path(root).resolve()
    wanted = {"version": VERSION, "size": SIZE, **counts}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{what}: {name} is a number of pictures, expected at least 1, found {count}")
    if _complete(root, wanted):
        return given
    _refuse_foreign(root, ours, what)
    fresh = root.parent / f".{root.name}-{uuid.uuid4().hex}"
    aside = fresh.with_suffix(".old")

    def write(job):
        written = []
        for name, content in pictures_of(job):
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            else:
                how = (
                    {"compress_level": 4} if path.suffix == ".png" else {"quality": 95} if path.suffix == ".JPG" else {}
                )
                Image.fromarray(content).save(path, **how)
            written.append((name, path.stat().st_size))
        return written

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = dict(entry for written in pool.map(write, jobs) for entry in written)
        (fresh / STAMP).write_text(json.dumps({**wanted, "files": files}, indent=1))
        for attempt in range(4):
            try:
                fresh.rename(root)  # succeeds where root is absent or empty
                break
            except OSError:
                if _complete(root, wanted):  # another process was first
                    break
                if attempt == 3:
                    raise
            aside.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # another process may have moved it just now
                root.rename(aside / str(attempt))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    return given


def _jobs(category, train, good, per_defect):
    """(category, split, kind, index) of each picture of one category, defective ones last."""
    counts = [
        ("train", "good", train),
        ("test", "good", good),
        *(("test", kind, per_defect) for kind in DEFECTS[category]),
    ]
    return [(category, split, kind, index) for split, kind, count in counts for index in range(count)]


def draw_demo(root, *, train=30, good=8, per_defect=4):
    """Draw the demo set in MVTec AD's layout, unless `root` already holds it whole; returns `root` as a Path.

    Per category: `train` defect-free pictures to learn from, `good` defect-free and 4 * `per_defect` defective ones to
    test on: RGB PNG of 256 x 256 pixels, masks 0 or 255. Defects stay inside the central 224 pixels; each kind has subtle
    ones (every fourth from 000 on). The same arguments and `VERSION` give the same bytes. A killed or a second process
    leaves no half set; an incomplete or older one is drawn again.
    Raises ValueError for a count below 1, and where drawing again would delete files that are not the set's.
    """

    def pictures_of(job):
        category, split, kind, index = job
        picture, _, mask = _picture(*job)
        yield f"{category}/{split}/{kind}/{index:03d}.png", picture
        if kind != "good":
            yield f"{category}/ground_truth/{kind}/{index:03d}_mask.png", mask.astype(np.uint8) * 255

    counts = {"train": train, "good": good, "per_defect": per_defect}
    ours = rf"({'|'.join(DEFECTS)})/(train|test|ground_truth)/\w+/\d+(_mask)?\.png"
    jobs = [job for category in DEFECTS for job in _jobs(category, **counts)]
    return _draw_set("draw_demo", root, counts, ours, jobs, pictures_of)


# BTAD's three products: the scene that stands for each, extension of pictures and of masks, (width, height).
BTAD = {
    "01": ("gear", "bmp", "png", (SIZE, SIZE)),
    "02": ("fabric", "png", "png", (SIZE, SIZE)),
    "03": ("circuit", "bmp", "bmp", (800, 600)),
}


def draw_demo_btad(root, *, train=12, good=4, per_defect=1):
    """Draw a small set in BTAD's layout (`01` to `03`, `train/ok`, `test/ok`, `test/ko`, `ground_truth/ko`); as `draw_demo`.

    bmp and png are mixed, within 02 too; masks have their picture's stem and an extension of their own; 03 is 800 x 600.
    """

    def pictures_of(job):
        product, (scene, split, kind, index) = job
        _, extension, mask_extension, size = BTAD[product]
        picture, _, mask = _picture(scene, split, kind, index)
        if kind != "good":
            index += per_defect * DEFECTS[scene].index(kind)
        if product == "02" and index % 3 == 2:
            extension = "bmp"
        stem = f"{index:04d}"
        resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        yield f"{product}/{split}/{'ok' if kind == 'good' else 'ko'}/{stem}.{extension}", np.asarray(resized)
        if kind != "good":
            mask = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
            yield f"{product}/ground_truth/ko/{stem}.{mask_extension}", np.asarray(mask)

    counts = {"train": train, "good": good, "per_defect": per_defect}
    ours = r"0[123]/(train|test|ground_truth)/(ok|ko)/\d+\.(bmp|png)"
    jobs = [(product, job) for product, (scene, *_) in BTAD.items() for job in _jobs(scene, **counts)]
    return _draw_set("draw_demo_btad", root, counts, ours, jobs, pictures_of)


VISA = ("circuit", "gear")


def draw_demo_visa(root, *, train=12, good=4, per_defect=1):
    """Draw a small set in VisA's layout (`split_csv/1cls.csv`, `CLASS/Data/Images/{Normal,Anomaly}`, masks); as `draw_demo`.

    Pictures are JPEG named .JPG; a mask's values are the number of its kind of defect, not 255.
    """
    counts = {"train": train, "good": good, "per_defect": per_defect}

    def place(job):
        """-> (path of the picture, path of its mask or "")"""
        category, split, kind, index = job
        if kind == "good":
            return f"{category}/Data/Images/Normal/{index + (train if split == 'test' else 0):04d}.JPG", ""
        stem = f"{index + per_defect * DEFECTS[category].index(kind):03d}"
        return f"{category}/Data/Images/Anomaly/{stem}.JPG", f"{category}/Data/Masks/Anomaly/{stem}.png"

    def pictures_of(job):
        if job is None:
            yield "split_csv/1cls.csv", table
            return
        name, mask_name = place(job)
        picture, _, mask = _picture(*job)
        yield name, picture
        if mask_name:
            yield mask_name, mask.astype(np.uint8) * (1 + DEFECTS[job[0]].index(job[2]))

    jobs = [job for category in VISA for job in _jobs(category, **counts)]
    rows = [(job[0], job[1], "normal" if job[2] == "good" else "anomaly", *place(job)) for job in jobs]
    table = "\n".join(",".join(row) for row in [("object", "split", "label", "image", "mask"), *rows]) + "\n"
    ours = rf"split_csv/1cls\.csv|({'|'.join(VISA)})/Data/(Images|Masks)/(Normal|Anomaly)/\d+\.(JPG|png)"
    return _draw_set("draw_demo_visa", root, counts, ours, [None, *jobs], pictures_of)
