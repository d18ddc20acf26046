// The forms' pictures. In Multi-reference they are dragged into another order, with the mouse, or with a finger that
// rests on one first. Python moves them: the script presses a hidden button, which sends where from and where to.
(() => {
  'use strict';
  const FAR = 6;  // pixels that a mouse moves before it drags, and a resting finger may move
  const REST = 350;  // milliseconds that a finger rests before it drags: until then it scrolls
  const GRID = '#multi .references';
  let held = null;  // what is pressed: item, index, box, x, y, and whether it is dragged yet
  let wait = 0;
  let dropped = false;  // the click that follows selects nothing

  const items = () => [...document.querySelectorAll(`${GRID} .gallery-item`)];
  const mark = (index) => items().forEach((item, place) => {
    item.classList.toggle('goes-before', held !== null && place === index && index < held.index);
    item.classList.toggle('goes-behind', held !== null && place === index && index > held.index);
  });
  // The item below a point, or the nearest in its row.
  const below = (x, y) => {
    let [best, least] = [-1, Infinity];
    items().forEach((item, place) => {
      const box = item === held.item ? held.box : item.getBoundingClientRect();  // where it came from
      const off = Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
      if (off < least) [best, least] = [place, off];
    });
    return least < 60 ? best : -1;
  };
  const lift = () => {
    held.dragged = true;
    held.item.classList.add('dragged');
  };
  const end = () => {
    clearTimeout(wait);
    if (!held) return;
    held.item.classList.remove('dragged');
    held.item.style.removeProperty('translate');
    const {dragged} = held;
    held = null;
    mark(-1);
    dropped = dragged;
  };

  addEventListener('pointerdown', (event) => {
    const item = event.target.closest?.(`${GRID} .gallery-item`);
    if (!item || event.button > 0 || !event.isPrimary || event.target.closest('.delete-button')) return;
    dropped = false;
    held = {
      item, index: items().indexOf(item), box: item.getBoundingClientRect(), x: event.clientX, y: event.clientY,
      dragged: false,
    };
    if (event.pointerType !== 'mouse') wait = setTimeout(() => { if (held) lift(); }, REST);
  });
  addEventListener('pointermove', (event) => {
    if (!held || !event.isPrimary) return;
    if (!event.buttons) { end(); return; }  // let go of outside the window
    const [across, down] = [event.clientX - held.x, event.clientY - held.y];
    if (!held.dragged) {
      if (Math.hypot(across, down) < FAR) return;
      if (event.pointerType !== 'mouse') { end(); return; }  // it scrolls
      lift();
    }
    held.item.style.translate = `${across}px ${down}px`;
    mark(below(event.clientX, event.clientY));
  });
  addEventListener('pointerup', (event) => {
    const from = held?.index;
    const to = held?.dragged ? below(event.clientX, event.clientY) : -1;
    end();
    if (to < 0 || to === from) return;
    window.studioReferences.moved = `${from},${to}`;
    document.getElementById('multi-move')?.click();
  });
  addEventListener('pointercancel', end);
  addEventListener('touchmove', (event) => { if (held?.dragged) event.preventDefault(); }, {passive: false});
  addEventListener('contextmenu', (event) => { if (held?.dragged) event.preventDefault(); });
  addEventListener('dragstart', (event) => { if (event.target.closest?.(GRID)) event.preventDefault(); });
  addEventListener('click', (event) => {
    if (!dropped || !event.target.closest?.(GRID)) return;
    dropped = false;
    event.preventDefault();
    event.stopPropagation();
  }, true);

  // How often the pictures of each form were cleared, and whether the last time was told yet. The button to clear stands
  // last above a gallery that shows none in large and has no other buttons.
  const clears = {};
  addEventListener('click', (event) => {
    const button = event.target.closest?.('.references .icon-button-wrapper > :last-child');
    const form = button?.closest('.sheet')?.id;
    if (form) clears[form] = {times: (clears[form]?.times ?? 0) + 1, told: false};
  }, true);

  window.studioReferences = {
    cleared: (form) => String(clears[form]?.times ?? 0),
    // The same when it was not told yet.
    toClear: (form) => {
      const clear = clears[form];
      if (!clear || clear.told) return '';
      clear.told = true;
      return String(clear.times);
    },
    moved: '',
    // The index of the selected picture, as text; empty for none.
    selected: () => {
      const index = items().findIndex((item) => item.querySelector('.thumbnail-item.selected'));
      return index < 0 ? '' : String(index);
    },
  };
})();
