// Runs before the first paint: light or dark, as the system has it or as was chosen here.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      const stored = localStorage.getItem("theme");
      return stored === "light" || stored === "dark" ? stored : "system";
    } catch {
      // Storage is switched off, so the choice lasts as long as the page.
      return root.dataset.chosen ?? "system";
    }
  };
  const apply = () => {
    root.dataset.chosen = chosen();
    root.dataset.theme =
      root.dataset.chosen === "system" ? (dark.matches ? "dark" : "light") : root.dataset.chosen;
    const bar = document.querySelector('meta[name="theme-color"]');
    if (bar) bar.content = root.dataset.theme === "dark" ? "#151413" : "#f7f5f1";
    document.dispatchEvent(new Event("themechange"));
  };
  window.setTheme = (theme) => {
    root.dataset.chosen = theme;
    try {
      if (theme === "system") localStorage.removeItem("theme");
      else localStorage.setItem("theme", theme);
    } catch {
      // applies all the same
    }
    apply();
  };
  dark.addEventListener("change", apply);
  addEventListener("storage", apply); // chosen in another tab
  apply();
})();
