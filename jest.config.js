/** Jest 30. The suite drives real virtual machines on a software CPU: few files, generous timeouts. */
module.exports = {
  testEnvironment: 'node',
  roots: ['<rootDir>/__test__'],
  testMatch: ['**/*.test.js', '**/*.test.mjs'],
  transform: {},
  testTimeout: 240_000,
  maxWorkers: 2,
}
