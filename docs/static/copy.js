// A button on every code block: the code without the prompts and the answers of an interpreter.
document.addEventListener("DOMContentLoaded", () => {
  for (const block of document.querySelectorAll("div.highlight")) {
    const code = block.querySelector("pre");
    const button = document.createElement("button");
    button.className = "copy";
    button.type = "button";
    button.textContent = "copy";
    button.addEventListener("click", async () => {
      let text = code.innerText;
      if (text.startsWith(">>> ")) {
        const lines = text.split("\n").filter(line => /^(>>>|\.\.\.) ?/.test(line));
        text = lines.map(line => line.slice(4)).join("\n");
      }
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
    block.append(button);
  }
});
