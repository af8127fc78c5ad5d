"""What is known of MetaWorld's 50 tasks: what they are about, and what a person would ask for."""

from collections.abc import Sequence

import numpy as np

from common import fail, nearest

MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
OBJECTS_AND_INSTRUCTIONS = {  # task: (what stands for {object} in a prompt, the instruction)
    "assembly": ("nut and peg", "put the nut on the peg"),
    "basketball": ("ball and hoop", "put the ball through the hoop"),
    "bin-picking": ("cube and bin", "move the cube to the other bin"),
    "box-close": ("box and lid", "put the lid on the box"),
    "button-press": ("button", "press the button"),
    "button-press-topdown": ("button", "press the button from the top"),
    "button-press-topdown-wall": ("button", "reach over the wall and press the button from the top"),
    "button-press-wall": ("button", "reach over the wall and press the button"),
    "coffee-button": ("coffee machine", "press the button of the coffee machine"),
    "coffee-pull": ("mug", "pull the mug away from the coffee machine"),
    "coffee-push": ("mug", "push the mug under the coffee machine"),
    "dial-turn": ("dial", "turn the dial"),
    "disassemble": ("nut and peg", "take the nut off the peg"),
    "door-close": ("door", "close the door"),
    "door-lock": ("door lock", "lock the door"),
    "door-open": ("door", "open the door"),
    "door-unlock": ("door lock", "unlock the door"),
    "drawer-close": ("drawer", "close the drawer"),
    "drawer-open": ("drawer", "open the drawer"),
    "faucet-close": ("faucet", "close the faucet"),
    "faucet-open": ("faucet", "open the faucet"),
    "hammer": ("hammer and nail", "hammer the nail into the wall"),
    "hand-insert": ("block and hole", "put the block into the hole"),
    "handle-press": ("handle", "press the handle down"),
    "handle-press-side": ("handle", "press the handle down from the side"),
    "handle-pull": ("handle", "pull the handle up"),
    "handle-pull-side": ("handle", "pull the handle up from the side"),
    "lever-pull": ("lever", "pull the lever up"),
    "peg-insert-side": ("peg and box", "insert the peg into the side of the box"),
    "peg-unplug-side": ("plug", "pull the plug out sideways"),
    "pick-out-of-hole": ("puck", "pick the puck out of the hole"),
    "pick-place": ("puck", "pick up the puck and place it at the goal"),
    "pick-place-wall": ("puck", "pick up the puck and place it behind the wall"),
    "plate-slide": ("plate", "slide the plate into the cabinet"),
    "plate-slide-back": ("plate", "slide the plate out of the cabinet"),
    "plate-slide-back-side": ("plate", "slide the plate out of the cabinet sideways"),
    "plate-slide-side": ("plate", "slide the plate into the cabinet sideways"),
    "push": ("puck", "push the puck to the goal"),
    "push-back": ("block", "pull the block back to the goal"),
    "push-wall": ("puck", "push the puck around the wall to the goal"),
    "reach": ("puck", "reach the goal"),
    "reach-wall": ("puck", "reach the goal behind the wall"),
    "shelf-place": ("block and shelf", "place the block on the shelf"),
    "soccer": ("ball and goal", "push the ball into the goal"),
    "stick-pull": ("stick and mug", "pull the mug with the stick"),
    "stick-push": ("stick and mug", "push the mug with the stick"),
    "sweep": ("block", "sweep the block off the table"),
    "sweep-into": ("block", "sweep the block into the hole"),
    "window-close": ("window", "close the window"),
    "window-open": ("window", "open the window"),
}
OBJECTS = {task: thing for task, (thing, _) in OBJECTS_AND_INSTRUCTIONS.items()}
INSTRUCTIONS = {task: instruction for task, (_, instruction) in OBJECTS_AND_INSTRUCTIONS.items()}
TASKS = tuple(OBJECTS)


AXES = (("left", "right"), ("back", "forward"), ("down", "up"))  # of the hand's x, y, z
HAND_MOVES = 0.01  # metres
GRIPPER_MOVES = 0.05  # of its opening, 0 to 1


def language_motion(now: np.ndarray, later: np.ndarray) -> str:
    """What the robot does between two states (39,), in words: "move left and down, open the gripper", "stay".

    One rule for all tasks, in the manner of RT-H (Belkhale et al., arXiv 2403.01823). A state begins with the
    hand's x, y, z in metres and the gripper's opening.
    """
    directions = []
    for axis, (negative, positive) in enumerate(AXES):
        change = later[axis] - now[axis]
        if abs(change) > HAND_MOVES:
            directions.append(positive if change > 0 else negative)
    phrases = []
    if directions:
        phrases.append(f"move {' and '.join(directions)}")
    if later[3] - now[3] > GRIPPER_MOVES:
        phrases.append("open the gripper")
    if now[3] - later[3] > GRIPPER_MOVES:
        phrases.append("close the gripper")
    return ", ".join(phrases) or "stay"


def task_name(name: str) -> str:
    """The short name of a task, from itself or from MetaWorld's own ("drawer-open-v3"); else one line."""
    short = name.removesuffix("-v3")
    if short not in TASKS:
        fail(nearest(short, [*TASKS, "mt10"], "task"))
    return short


def task_names(names: Sequence[str]) -> tuple[str, ...]:
    """Their short names, each once; `mt10` stands for the ten of MT10."""
    tasks = []
    for name in names:
        if name == "mt10":
            tasks.extend(MT10)
        else:
            tasks.append(task_name(name))
    return tuple(dict.fromkeys(tasks))
