// Builds the Rust parts: the addon (a shared library that Node loads) and the guest agent (a static binary).

import { copyFileSync, existsSync, readFileSync, renameSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { root, run, ScriptError, size, step } from './progress.mjs'

const ADDON = join(root, 'amberbox.linux-x64-gnu.node')

/** Runs `cargo build` and returns the files it made, by target name. */
async function build(args, note, options = {}) {
  const files = new Map()
  let crates = 0
  await run('cargo', ['build', '--locked', '--message-format=json-render-diagnostics', ...args], {
    ...options,
    onLine(line) {
      if (line.startsWith('{')) {
        const message = JSON.parse(line)
        if (message.reason === 'compiler-artifact') files.set(message.target.name, message.filenames)
        return
      }
      const compiling = /^\s*(Compiling|Downloading|Downloaded|Building) (\S+)/.exec(line)
      if (compiling) note(`${++crates}: ${compiling[1].toLowerCase()} ${compiling[2]}`)
    },
  })
  return files
}

/** Builds the addon and puts it where the loader looks. */
export async function buildAddon() {
  await step('addon (cargo, release)', async (note) => {
    const files = await build(['--release', '-p', 'amberbox', '--lib'], note)
    const library = files.get('amberbox')?.find((file) => file.endsWith('.so'))
    if (!library) throw new ScriptError('cargo built no shared library of the package amberbox')
    // A new file under the old name: a running process may have the old one mapped.
    if (!existsSync(ADDON) || !readFileSync(ADDON).equals(readFileSync(library))) {
      const temporary = `${ADDON}.${process.pid}`
      try {
        copyFileSync(library, temporary)
        renameSync(temporary, ADDON)
      } finally {
        rmSync(temporary, { force: true })
      }
    }
    return size(statSync(ADDON).size)
  })
  return ADDON
}

/** The guest starts the agent before there are any libraries: it is linked statically. */
const AGENT_TARGET = 'x86_64-unknown-linux-gnu'

/** Builds the guest agent. */
export async function buildAgent() {
  let binary
  await step('guest agent (cargo, static)', async (note) => {
    const env = { ...process.env, RUSTFLAGS: '-C target-feature=+crt-static -C relocation-model=static' }
    const files = await build(
      ['--profile', 'agent', '-p', 'amber-agent', '--bins', '--target', AGENT_TARGET],
      note,
      {
        env,
      },
    )
    binary = files.get('amber-agent')?.[0]
    if (!binary) throw new ScriptError('cargo built no binary of the package amber-agent')
    return size(statSync(binary).size)
  })
  return binary
}
