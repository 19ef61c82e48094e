"""Jointed figures whose categories differ in posture or in proportion alone, for `detector shapes --kind figures`.

A figure faces the viewer, so that its left is to the right. It leans, bends its joints and has a build of its own.
Lengths are shares of its height where it stands upright with usual proportions; y points down.
"""

from __future__ import annotations

import numpy as np

CATEGORIES = {1: "standing", 3: "waving", 4: "sitting", 6: "long_legged", 7: "long_armed"}  # COCO's ids have gaps too
SIDES = {"left": 1, "right": -1}
KEYPOINTS = ["head", "neck", "hip"] + [f"{side}_{name}" for name in ("elbow", "hand", "knee", "foot") for side in SIDES]
BONES = [("head", "neck"), ("neck", "hip")] + [
    bone
    for side in SIDES
    for bone in (
        ("neck", f"{side}_elbow"),
        (f"{side}_elbow", f"{side}_hand"),
        ("hip", f"{side}_knee"),
        (f"{side}_knee", f"{side}_foot"),
    )
]
ARM, LEG = (0.17, 0.16), (0.22, 0.24)  # upper and lower part
SHOULDER, HIP = 0.08, 0.045  # half the width there
# Degrees from hanging down outwards, and of the joint in the middle, where straight is 0.
POSTURES = {"arms": ((10, 50), (-10, 50)), "legs": ((3, 25), (-25, 10))}
RAISED, SEATED = ((115, 165), (0, 50)), ((75, 100), (-110, -70))


def figure(name: str, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """The parts, outlines [P, 2] that overlap, and the KEYPOINTS [K, 2] of a figure of the named category."""
    build = rng.uniform(0.85, 1.15, 3)  # of torso, arms and legs
    torso = 0.3 * build[0] * (0.75 if name == "long_legged" else 1)
    arm = build[1] * (1.6 if name == "long_armed" else 1)
    leg = build[2] * (1.55 if name == "long_legged" else 1)
    stout = rng.uniform(0.8, 1.3)
    hip, neck = np.zeros(2), np.array([0, -torso])
    head = neck + [rng.uniform(-0.02, 0.02), -0.13]
    points = {"hip": hip, "neck": neck, "head": head}
    turn = np.arange(24) * (2 * np.pi / 24)
    parts = [
        head + 0.08 * np.stack([0.85 * np.cos(turn), np.sin(turn)], 1),
        limb(head, neck, 0.045),
        np.stack([hip, hip, neck, neck]) + [[-0.07 * stout, 0.04], [0.07 * stout, 0.04], [0.095, 0], [-0.095, 0]],
    ]
    ahead = rng.choice([-1, 1])  # both legs of one that sits
    for side, way in SIDES.items():
        upper, bend = (rng.uniform(*angles) for angles in (RAISED if name == "waving" else POSTURES["arms"]))
        elbow, hand = joints(neck + [way * SHOULDER, 0.02], way, upper, bend, ARM, arm)
        upper, bend = (rng.uniform(*angles) for angles in (SEATED if name == "sitting" else POSTURES["legs"]))
        start = hip + [way * HIP, 0.02]
        knee, foot = joints(start, ahead if name == "sitting" else way, upper, bend, LEG, leg)
        parts += [limb(neck + [way * SHOULDER, 0.02], elbow, 0.045), limb(elbow, hand, 0.04)]
        parts += [limb(start, knee, 0.065), limb(knee, foot, 0.05)]
        points |= {f"{side}_elbow": elbow, f"{side}_hand": hand, f"{side}_knee": knee, f"{side}_foot": foot}
    lean = np.deg2rad(np.clip(rng.normal(0, 15), -40, 40))
    rotation = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    return [part @ rotation for part in parts], np.stack([points[key] for key in KEYPOINTS]) @ rotation


def joints(start, way: int, upper: float, bend: float, lengths: tuple[float, float], longer: float) -> list[np.ndarray]:
    """The middle and the end of a limb; `upper` and `bend` in degrees, `way` = 1 to the right and -1 to the left."""
    places = [start]
    for angle, length in zip(np.deg2rad([upper, upper + bend]), lengths):
        places.append(places[-1] + length * longer * np.array([way * np.sin(angle), np.cos(angle)]))
    return places[1:]


def limb(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """The outline of all points within half the width of the line from a to b."""
    along = np.arctan2(*(b - a)[::-1])
    turn = np.linspace(-np.pi / 2, np.pi / 2, 8)
    around = lambda angles: width / 2 * np.stack([np.cos(angles), np.sin(angles)], 1)  # noqa: E731
    return np.concatenate([b + around(along + turn), a + around(along + np.pi + turn)])
