// Before and after, on the stage and in History: the original as long as a button is held, in turns with the result, or
// beside it with a slider between the two.
(() => {
  'use strict';
  const TURN = 500;  // milliseconds that each of the two is seen: no flashing, which would be from three times a second on
  const calm = () => matchMedia('(prefers-reduced-motion: reduce)').matches;

  // `set(true)` shows the original, `set(false)` the result. By touch, mouse, or space and Enter.
  const hold = (button, set) => {
    button.addEventListener('pointerdown', (event) => { button.setPointerCapture(event.pointerId); set(true); });
    for (const end of ['pointerup', 'pointercancel', 'blur']) button.addEventListener(end, () => set(false));
    button.addEventListener('keydown', (event) => {
      if (event.key !== ' ' && event.key !== 'Enter') return;
      event.preventDefault();
      set(true);
    });
    button.addEventListener('keyup', () => set(false));
    button.addEventListener('contextmenu', (event) => event.preventDefault());
  };

  // Who asks for less motion has each press show the other one. Returns what ends it.
  const flicker = (button, set) => {
    let [timer, before] = [0, false];
    const turn = (to) => { before = to; set(to); };
    const press = (on) => button.setAttribute('aria-pressed', String(on));
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      press(false);
      if (before) turn(false);
    };
    button.addEventListener('click', () => {
      if (timer) {
        stop();
      } else if (calm()) {
        turn(!before);
        press(before);
      } else {
        press(true);
        turn(true);
        timer = setInterval(() => { if (button.offsetParent) turn(!before); else stop(); }, TURN);
      }
    });
    return stop;
  };

  // The large view of History: `viewer` is its dialog, `source` the address of the original; null for none.
  const wired = new WeakMap();
  const viewer = (dialog, source) => {
    if (!wired.has(dialog)) wired.set(dialog, wire(dialog));
    wired.get(dialog)(source);
  };
  const wire = (dialog) => {
    const figure = dialog.querySelector('figure');
    const [original, bar] = [figure.querySelector('.before'), figure.querySelector('.comparison')];
    const [slide, range] = [bar.querySelector('.slide'), bar.querySelector('input')];
    let address = null;
    const fetched = () => { if (address && original.src !== address) original.src = address; };
    const at = (percent) => {
      range.value = String(percent);
      figure.style.setProperty('--at', `${percent}%`);
    };
    const sliding = (on) => {
      fetched();
      figure.classList.toggle('comparing', on);
      slide.setAttribute('aria-pressed', String(on));
      range.hidden = !on;
    };
    const set = (held) => { fetched(); figure.classList.toggle('held', held); };
    hold(bar.querySelector('.hold'), set);
    const stop = flicker(bar.querySelector('.flicker'), set);
    slide.addEventListener('click', () => { stop(); sliding(!figure.classList.contains('comparing')); });
    range.addEventListener('input', () => at(Number(range.value)));
    const drag = (event) => {
      if (!figure.classList.contains('comparing') || !(event.buttons & 1) || event.target.closest('button, input')) return;
      const box = figure.getBoundingClientRect();
      at(Math.round(Math.min(100, Math.max(0, (event.clientX - box.left) / box.width * 100))));
    };
    figure.addEventListener('pointerdown', drag);
    figure.addEventListener('pointermove', drag);
    figure.addEventListener('dragstart', (event) => event.preventDefault());
    for (const near of ['pointerenter', 'focusin']) bar.addEventListener(near, fetched);
    original.addEventListener('error', () => { bar.hidden = true; stop(); sliding(false); });
    const show = (source) => {
      stop();
      address = null;  // what was shown before is not fetched for this one
      figure.classList.remove('held');
      sliding(false);
      original.removeAttribute('src');
      bar.hidden = !source;
      address = source && new URL(source, location.href).href;
      at(50);
    };
    dialog.addEventListener('close', () => { if (!dialog.open) show(null); });  // it may be open again by now
    return show;
  };

  window.studioCompare = {hold, flicker, viewer};
})();
