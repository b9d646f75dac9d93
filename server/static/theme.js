"use strict";

// No module: it runs before the first paint, so that a page never flashes in the other theme.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");

  const current = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
  const other = () => (current() === "dark" ? "light" : "dark");

  // A browser may forbid to keep anything; then the choice lasts as long as the page.
  function remembered() {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null;
    }
  }

  function remember(theme) {
    try {
      localStorage.setItem("theme", theme);
    } catch {
      // It is not kept.
    }
  }

  function connect() {
    const button = document.getElementById("theme");
    const describe = () => {
      button.title = `Switch to the ${other()} theme`;
      button.setAttribute("aria-label", button.title);
    };
    button.addEventListener("click", () => {
      root.dataset.theme = other();
      remember(root.dataset.theme);
      describe();
    });
    dark.addEventListener("change", describe);
    describe();
  }

  const theme = remembered();
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  document.addEventListener("DOMContentLoaded", connect);
})();
