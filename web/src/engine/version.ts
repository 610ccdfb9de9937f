/** The version of pocketfusion that this page is of, put in by Vite from pyproject.toml. */
declare const __VERSION__: string;

export const VERSION = __VERSION__;
