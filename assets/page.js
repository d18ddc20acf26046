// What the whole page hears: keys, and pictures that are pasted or dropped anywhere; and what of Gradio's own markup
// has to be mended for the keyboard and for screen readers. All words that it says stand here:
(() => {
  'use strict';
  const WORDS = {
    sent: {
      edit: () => studioSay('Sent to Edit, as the picture to edit.'),
      multi: () => studioSay('Sent to Multi-reference, after the others.'),
      inspect: () => studioSay('Sent to Inspect.'),
    },
    over: {
      edit: () => studioSay('Drop it anywhere: it becomes the picture to edit.'),
      multi: () => studioSay('Drop it anywhere: it joins the references.'),
      inspect: () => studioSay('Drop it anywhere: it is inspected.'),
    },
    one: {
      edit: (name) => studioSay('Edit takes one picture: {name}. Multi-reference combines several.', {name}),
      inspect: (name) => studioSay('Inspect looks at one picture at a time: {name}.', {name}),
    },
    noPicture: (names) => studioSay('{names} is no picture: paste or drop a PNG, JPEG or WebP file.', {names}),
    leftOut: (names) => studioSay('{names} was left out: it is no picture.', {names}),
    nothing: () => studioSay('There is no picture in the clipboard: copy a picture, or the file of one, and paste again.'),
    busy: () => studioSay('The last picture is still on its way: paste or drop this one again in a moment.'),
    stopping: () => studioSay('Stopping the run. What is finished is kept.'),
    none: () => studioSay('No prompt was run here yet. Those that you run are found again with Ctrl + Up.'),
    oldest: () => studioSay('This is the oldest prompt.'),
    draft: () => studioSay('This is what you were writing.'),
    prompt: (place, all) => studioSay('Prompt {place} of {all}, newest first.', {place, all}),
    forgotten: () => studioSay('The prompts were forgotten.'),
    code: () => studioSay('Code; the arrow keys scroll it'),
  };

  // --- telling

  const READ_FOR = 12000;  // milliseconds that a sentence stays
  const bar = Object.assign(document.createElement('div'), {id: 'told', hidden: true});
  bar.setAttribute('role', 'status');
  let hide = 0;
  const say = (text) => {
    bar.hidden = !text;
    bar.textContent = text;
    clearTimeout(hide);
    if (text) hide = setTimeout(() => say(''), READ_FOR);
  };

  // --- where one is

  const seen = (node) => Boolean(node?.offsetParent);
  const tab = () => document.querySelector('#tabs [role="tab"][aria-selected="true"]')?.id.replace(/-button$/, '');
  const TYPED = 'textarea, select, [contenteditable="true"], input:not([type="range"], [type="checkbox"], [type="radio"])';
  const typing = (target) => target instanceof Element && Boolean(target.closest(TYPED));

  // --- prompts that were run in this browser, newest first, for each form

  const MOST = 50, ROOM = 100000;  // prompts kept, and characters in all of them
  const place = (form) => `flux2-studio.prompts.${form}`;
  const kept = {};  // where the browser lets this page keep nothing: until it is closed
  const prompts = (form) => {
    try {
      const read = JSON.parse(localStorage.getItem(place(form)) ?? '[]');
      return Array.isArray(read) ? read.filter((one) => typeof one === 'string') : [];
    } catch {
      return kept[form] ?? [];
    }
  };
  const keep = (form, texts) => {
    kept[form] = texts;
    try {
      localStorage.setItem(place(form), JSON.stringify(texts));
    } catch {
      // Private windows and full disks: `kept` has them.
    }
  };
  const walks = new Map();  // of each form: the texts that one steps through, what was being written first
  const ran = (form, prompt) => {
    walks.delete(form);
    if (!prompt.trim()) return;
    let room = ROOM;
    const texts = [prompt, ...prompts(form).filter((other) => other !== prompt)].slice(0, MOST);
    keep(form, texts.filter((text) => (room -= text.length) >= 0));
  };
  const step = (form, field, by) => {
    let walk = walks.get(form);
    if (!walk) {
      walk = {texts: [field.value, ...prompts(form).filter((text) => text !== field.value)], at: 0};
      walks.set(form, walk);
    } else if (field.value !== walk.texts[walk.at]) {
      walk.texts.splice(walk.at, 0, field.value);  // one that was changed on the way is a draft of its own
    }
    const next = walk.at + by;
    if (walk.texts.length === 1) { say(WORDS.none()); return; }
    if (next < 0) { say(WORDS.draft()); return; }
    if (next >= walk.texts.length) { say(WORDS.oldest()); return; }
    walk.at = next;
    field.value = walk.texts[next];
    field.dispatchEvent(new Event('input', {bubbles: true}));
    field.setSelectionRange(field.value.length, field.value.length);
    say(next ? WORDS.prompt(next, walk.texts.length - 1) : WORDS.draft());
  };
  const forget = () => {
    for (const form of ['generate', 'edit', 'multi']) keep(form, []);
    walks.clear();
    say(WORDS.forgotten());
  };

  // --- keys

  const help = () => document.getElementById('keys-help');
  const beside = (dialog, {clientX, clientY}) => {
    const {left, right, top, bottom} = dialog.getBoundingClientRect();
    return clientX < left || clientX > right || clientY < top || clientY > bottom;
  };
  // What Escape closes by itself, or does already.
  const closes = (target) => document.fullscreenElement
    || document.querySelector('dialog[open], [role="listbox"]')
    || (target instanceof Element && target.closest('select, input[type="search"], .preview'));
  addEventListener('keydown', (event) => {
    const {key, target} = event;
    if (event.isComposing || event.defaultPrevented) return;
    const control = event.ctrlKey || event.metaKey;
    if (key === 'Enter' && control) {
      const run = target.closest?.('.sheet')?.querySelector('button.run');
      if (run && !run.disabled) { event.preventDefault(); target.blur(); run.click(); }
    } else if (key === 'Escape' && !event.repeat && !closes(target)) {
      const stop = [...document.querySelectorAll('#stop, #explore-stop, .enhance-stop')].find(seen);
      if (stop && !stop.disabled) { event.preventDefault(); stop.click(); say(WORDS.stopping()); }
    } else if ((key === 'ArrowUp' || key === 'ArrowDown') && (event.ctrlKey || event.altKey)) {
      const form = target.closest?.('.prompt textarea') && target.closest('.sheet')?.id;
      if (form) { event.preventDefault(); step(form, target, key === 'ArrowUp' ? 1 : -1); }
    } else if (key === '?' && !control && !typing(target) && !document.querySelector('dialog[open]')) {
      event.preventDefault();
      help()?.showModal();
    }
  }, true);  // before a list that Escape closes is closed

  addEventListener('click', (event) => {
    const {target} = event;
    if (target.closest('#look')) document.body.classList.toggle('dark');
    if (target.closest('#keys')) help()?.showModal();
    if ((target === help() && beside(help(), event)) || target.closest('#keys-help .close')) help().close();
    if (target.closest('#keys-help .forget')) { help().close(); forget(); }
    const sheet = target.closest('button.run')?.closest('.sheet');
    const prompt = sheet?.querySelector('.prompt textarea');
    if (prompt) ran(sheet.id, prompt.value);
  }, true);

  // --- pictures that are pasted or dropped

  // On a tab that takes no picture it is one to edit. While a picture in it is selected the gallery has no input, and
  // the button beside it takes its place.
  const INPUTS = {
    edit: '#edit .references input[type=file]',
    multi: '#multi :is(.references, .tools) input[type=file]',
    inspect: '#inspect .references input[type=file]',
  };
  const goal = () => (tab() in INPUTS ? tab() : 'edit');
  const NAMED = /\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)$/i;
  const isPicture = (file) => file.type.startsWith('image/') || NAMED.test(file.name);
  const names = (files) => files.map((file) => file.name).join(', ');
  const input = async (where) => {
    // A tab's contents come into the page when it is first opened, which a busy machine takes its time for.
    const end = performance.now() + (document.querySelector(`#${where} .references`) ? 5000 : 60000);
    if (tab() !== where) document.getElementById(`${where}-button`)?.click();
    for (;;) {
      const found = document.querySelector(INPUTS[where]);
      if (found || performance.now() > end) return found;
      await new Promise((done) => setTimeout(done, 50));
    }
  };
  const take = async (files) => {
    const pictures = files.filter(isPicture);
    const others = files.filter((file) => !isPicture(file));
    if (!pictures.length) { say(WORDS.noPicture(names(others))); return; }
    const where = goal(), went = tab() !== where;
    const taken = WORDS.one[where] ? pictures.slice(0, 1) : pictures;
    const field = await input(where);
    if (!field) { say(WORDS.busy()); return; }
    const carrier = new DataTransfer();
    taken.forEach((file) => carrier.items.add(file));
    field.files = carrier.files;
    field.dispatchEvent(new Event('change', {bubbles: true}));
    if (went) document.getElementById('tabs').scrollIntoView({block: 'nearest'});
    say([
      taken.length < pictures.length ? WORDS.one[where](taken[0].name) : WORDS.sent[where](),
      others.length ? WORDS.leftOut(names(others)) : '',
    ].join(' '));
  };
  addEventListener('paste', (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    const text = event.clipboardData?.types.includes('text/plain');
    if (document.querySelector('dialog[open]') || (typing(event.target) && (text || !files.length))) return;
    event.preventDefault();
    if (files.length) take(files);
    else say(WORDS.nothing());
  });
  // What has a use of its own for files: those that Explore and presets read.
  const foreign = (target) => {
    const zone = target instanceof Element ? target.closest('.upload-container') : null;
    return document.querySelector('dialog[open]') || (zone && !zone.closest('.references'));
  };
  // A picture of this page that is dragged is meant only where it is put onto references: others slip easily.
  let own = false;
  addEventListener('dragstart', () => { own = true; }, true);
  addEventListener('dragend', () => { own = false; }, true);
  const slipped = (target) => own && !(target instanceof Element && target.closest('.references'));
  addEventListener('dragover', (event) => {
    if (!event.dataTransfer?.types.includes('Files') || foreign(event.target) || slipped(event.target)) return;
    event.preventDefault();
    say(WORDS.over[goal()]());
  });
  addEventListener('drop', (event) => {
    const files = [...(event.dataTransfer?.files ?? [])];
    if (!files.length || foreign(event.target) || slipped(event.target)) return;
    event.preventDefault();  // or the browser would leave the page to show the file
    event.stopPropagation();
    if (event.target instanceof Element) event.target.dispatchEvent(new DragEvent('dragleave', {bubbles: true}));
    take(files);
  }, true);

  // --- Gradio's markup, mended

  const MENDS = {
    // A button within a button: the outer one has the name and the focus, the inner one opens the files (see below).
    'button button.upload-container:not([inert])': (inner) => { inner.inert = true; },
    // A message whose head is a button, with the button in it that closes it. It keeps the focus, and still unfolds.
    '.toast-header[role="button"]': (head) => head.setAttribute('role', 'group'),
    // One picture is offered where one is taken.
    '.references.one input[type="file"][multiple]': (field) => field.removeAttribute('multiple'),
    // Code that is longer than its box is scrolled with the keyboard, too.
    '.cm-scroller:not([tabindex="0"])': (box) => {
      box.tabIndex = 0;
      box.setAttribute('role', 'group');
      box.setAttribute('aria-label', WORDS.code());
    },
  };
  // Heard for the page, not at each of them: Gradio may draw one anew between the eye and the key.
  addEventListener('click', (event) => {
    const inner = event.target.closest?.('button')?.querySelector('button.upload-container');
    if (inner) inner.click();
  });
  let waiting = false;
  const mend = () => {
    waiting = false;
    if (!bar.isConnected) document.querySelector('.gradio-container')?.append(bar);
    for (const [selector, action] of Object.entries(MENDS)) document.querySelectorAll(selector).forEach(action);
  };
  const soon = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(mend, 50);  // not at the next frame: a page in the background has none
  };
  new MutationObserver(soon).observe(document, {childList: true, subtree: true});
  soon();

  window.studioPage = {say};
})();
