// The pages of code follow the choice that a reader made on the other pages.
(() => {
  const chosen = localStorage.getItem("theme");
  const dark = chosen === "dark" ||
    (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
})();
