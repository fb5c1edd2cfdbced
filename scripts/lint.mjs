#!/usr/bin/env node
// `npm run lint`: formatting and static checks of everything, without building the guest. All checks run, whatever fails.

import { apiPages } from './docs.mjs'
import { main, npmPackages, root, run, ScriptError, step, tool } from './progress.mjs'

const node = process.execPath

await main(async () => {
  process.chdir(root)
  await npmPackages()
  const failures = []
  const check = (name, command, args) =>
    attempt(() => step(name, (note) => run(command, args, { onLine: (line) => note(line.trim()) })))
  const attempt = async (body) => {
    try {
      await body()
    } catch (error) {
      if (!(error instanceof ScriptError)) throw error
      failures.push(error.message)
    }
  }
  await check('rustfmt', 'cargo', ['fmt', '--all', '--check'])
  await check('prettier', node, [tool('prettier', 'bin', 'prettier.cjs'), '--check', '.'])
  await check('types (tsc)', node, [tool('typescript', 'bin', 'tsc'), '-p', '.'])
  await attempt(apiPages)
  await check('clippy', 'cargo', [
    'clippy',
    '--workspace',
    '--all-targets',
    '--locked',
    '--',
    '-D',
    'warnings',
  ])
  if (failures.length > 0) throw new ScriptError(failures.join('\n\n'))
})
