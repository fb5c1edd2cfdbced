#!/usr/bin/env node
// Makes a clone ready to use: addon, guest agent, guest image, base template. Everything is cached by content, so a
// second run takes a moment. Needs no `npm install`.

import { arch, platform } from 'node:os'
import { buildAddon, buildAgent } from './cargo.mjs'
import { hasProgram, heading, main, root, run, ScriptError, seconds } from './progress.mjs'

function checkHost() {
  if (platform() !== 'linux' || arch() !== 'x64') {
    throw new ScriptError(`Amberbox runs on Linux x64, this is ${platform()} ${arch()}.`)
  }
  const [major, minor] = process.versions.node.split('.').map(Number)
  if (major < 20 || (major === 20 && minor < 17)) {
    throw new ScriptError(`Amberbox needs Node.js 20.17 or newer, this is ${process.versions.node}.`)
  }
  if (!hasProgram('cargo')) {
    throw new ScriptError(
      'Rust is missing. Install it from https://rustup.rs (stable, 1.90 or newer), then run this again.',
    )
  }
  if (!hasProgram('cc')) {
    throw new ScriptError('A C compiler is missing. Run: sudo apt-get install -y build-essential')
  }
}

/** Sets everything up; returns the directory of the base template. */
export async function setup() {
  const began = Date.now()
  heading('Setting up Amberbox: what is there already is reused; the first time takes about 15 minutes')
  checkHost()
  const addon = await buildAddon()
  const agent = await buildAgent()
  // Prints its own steps, and says which Debian packages it needs or installs.
  await run(process.execPath, ['scripts/guest/build.mjs', 'all', '--agent', agent], { inherit: true })
  const { buildTemplate } = await import('./template.mjs')
  const template = await buildTemplate(addon, agent)
  heading(`Ready in ${seconds(began)}\n`)
  return template
}

if (process.argv[1] === import.meta.filename) {
  process.chdir(root)
  await main(setup)
}
