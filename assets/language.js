// The page's words where Gradio does not translate them: in fixed HTML, and in scripts. The catalogue is the one that
// Gradio's page has; English is the key, and what stays where it has nothing.
(() => {
  'use strict';
  const PREFIX = 'flux2-studio: ';
  const tables = () => window.gradio_config?.i18n_translations ?? {};
  const first = navigator.language || navigator.languages[0] || 'en';
  // As Gradio's page chooses, and language_of in ui/gradio_compat/language.py.
  const language = () => [first, first.split('-')[0]].find((name) => Object.hasOwn(tables(), name)) ?? 'en';

  // `text` (English) in the reader's language, with its {placeholders} filled: for textContent and attributes.
  window.studioSay = (text, values = {}) => {
    const said = tables()[language()]?.[PREFIX + text] ?? text;
    return said.replace(/\{(\w+)\}/g, (whole, name) => (Object.hasOwn(values, name) ? String(values[name]) : whole));
  };

  const plain = (text) => text.trim().replace(/\s+/g, ' ');
  const texts = (element) => [...element.childNodes].filter((node) => node.nodeType === 3 && plain(node.data));
  // A sentence around elements has {0}, {1}, ... in their places.
  const sentence = (element) => {
    const inside = [...element.children];
    const parts = [...element.childNodes].map((node) => (
      node.nodeType === 3 ? node.data : node.nodeType === 1 ? `{${inside.indexOf(node)}}` : ''));
    const key = plain(parts.join(''));
    const said = window.studioSay(key);
    if (said === key) return;
    element.replaceChildren(...said.split(/\{(\d)\}/).map((part, place) => (place % 2 ? inside[Number(part)] : part)));
  };
  const translate = (element) => {
    for (const name of ['aria-label', 'title', 'placeholder']) {
      if (!element.hasAttribute(name)) continue;
      const said = window.studioSay(element.getAttribute(name));
      if (said !== element.getAttribute(name)) element.setAttribute(name, said);
    }
    const [node, ...others] = texts(element);
    if (others.length) {
      sentence(element);
    } else if (node) {
      const said = window.studioSay(plain(node.data));
      if (said !== plain(node.data)) node.data = node.data.replace(/\S(?:[^]*\S)?/, () => said);
    }
  };
  const marked = (node) => (node.nodeType !== 1 ? []
    : [...(node.hasAttribute('data-i18n') ? [node] : []), ...node.querySelectorAll('[data-i18n]')]);

  new MutationObserver((changes) => {
    // Gradio's page names the browser's own language, even where there is no catalogue for it.
    if (document.documentElement.lang !== language()) document.documentElement.lang = language();
    if (language() === 'en') return;
    for (const change of changes) {
      if (change.type === 'characterData') {
        if (change.target.parentElement?.hasAttribute('data-i18n')) translate(change.target.parentElement);
      } else {
        for (const node of change.addedNodes) marked(node).forEach(translate);
        // A text may come later than its element, as where a browser reads a long page in parts.
        const text = [...change.addedNodes].some((node) => node.nodeType === 3);
        if (text && change.target.nodeType === 1 && change.target.hasAttribute('data-i18n')) translate(change.target);
      }
    }
  }).observe(document.documentElement, {
    childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ['lang'],
  });
})();
