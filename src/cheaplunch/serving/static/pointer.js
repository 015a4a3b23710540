// The mouse, a pen or a finger on the stage: what it means, told to `act`.
//
// In the run's view a left click adds, a right click takes away, and a drag with Shift or the box tool draws a box. In
// the other views a press moves the crosshair. Everywhere: the wheel goes through slices, with Ctrl it zooms, the middle
// button moves what is seen, and with the key W held a drag changes window and level.

const STILL_PX = 5; // a press that moves less is a click

/** `act`: {click(ras, positive), boxed(from, to), refuse(line), windowed(level, width), usesBox(), isWindowing()} */
export function listen(stage, viewer, act) {
  let press = null;

  stage.addEventListener("contextmenu", (event) => viewer.image && event.preventDefault());

  stage.addEventListener("pointerdown", (event) => {
    if (!viewer.image || press || event.target.closest("button, input, .start")) return;
    const place = viewer.at(event.clientX, event.clientY);
    if (!place) return;
    event.preventDefault();
    stage.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    press = { ...place, button: event.button, x: event.clientX, y: event.clientY, kind: kindOf(event, place) };
    press.last = [event.clientX, event.clientY];
    if (press.kind === "look") viewer.moveTo(place.ras);
    if (press.kind === "box") press.ras = whole(place.ras);
  });

  stage.addEventListener("pointermove", (event) => {
    if (!press) return;
    const place = viewer.at(event.clientX, event.clientY);
    const [x, y] = press.last;
    press.last = [event.clientX, event.clientY];
    if (press.kind === "window") {
      act.windowed((event.clientY - y) / stage.clientHeight, (event.clientX - x) / stage.clientWidth);
    } else if (!place || place.world !== press.world) {
      return;
    } else if (press.kind === "look") {
      viewer.moveTo(place.ras);
    } else if (press.kind === "pan") {
      viewer.pan(viewer.at(x, y)?.ras ?? place.ras, place.ras);
      viewer.drawNow(); // the next move starts from what is seen
    } else if (press.kind === "box" && moved(event)) {
      viewer.draft = { from: press.ras, to: whole(place.ras), color: act.color() };
      viewer.draw();
    }
  });

  stage.addEventListener("pointerup", (event) => {
    const begun = press;
    if (!begun) return;
    const wasStill = !moved(event);
    press = null;
    const box = viewer.draft;
    viewer.draft = null;
    if (begun.kind === "box" && box) return act.boxed(box.from, box.to);
    viewer.draw();
    if (!["click", "box"].includes(begun.kind)) return;
    if (!wasStill) return act.refuse("That was a drag. For a box hold Shift, or choose the box tool.");
    if (!begun.inside) return act.refuse("That is beside the image.");
    if (begun.kind === "box" && !event.shiftKey) return act.refuse("A box is drawn by a drag from corner to corner.");
    act.click(whole(begun.ras), begun.button === 0);
  });

  stage.addEventListener("pointercancel", () => {
    press = viewer.draft = null;
    viewer.draw();
  });

  let wheeled = 0;
  stage.addEventListener(
    "wheel",
    (event) => {
      if (!viewer.image || event.target.closest(".start")) return;
      event.preventDefault();
      const place = viewer.at(event.clientX, event.clientY);
      if (!place) return;
      if (event.ctrlKey || event.metaKey) return viewer.zoom(Math.exp(-event.deltaY / 400), place.ras);
      // A notch of a mouse is a slice; a touchpad's many small steps add up to one.
      wheeled += event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? event.deltaY / 50 : event.deltaY;
      if (Math.abs(wheeled) < 1) return;
      viewer.scroll(place.world, -Math.sign(wheeled));
      wheeled = 0;
    },
    { passive: false },
  );

  const moved = (event) => Math.hypot(event.clientX - press.x, event.clientY - press.y) > STILL_PX;

  function kindOf(event, place) {
    if (event.button === 1) return "pan";
    if (act.isWindowing()) return "window";
    if (place.world !== viewer.main) return "look";
    return event.button === 0 && (event.shiftKey || act.usesBox()) ? "box" : "click";
  }

  function whole(ras) {
    return ras.map((at, w) => Math.min(Math.max(Math.round(at), 0), viewer.grid.rasShape[w] - 1));
  }
}
